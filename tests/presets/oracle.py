"""What every rank of a world spec holds, element by element: the preset's oracle.

Works like an engineer who reads the frameworks' code: takes whole Hugging Face tensors and joins, reshapes and slices them. Knows no boxes and no
strides, and must not read the library's presets: that the two agree is the test.

Every parameter is an array of element numbers: which element of which Hugging Face tensor lies there, -1 where it is padding. Values,
padding, and what a rank needs and does not hold all follow from it. Where the sides of a spec hold values differently, a target's are
converted from those of the source.
"""

from oracle_megatron import megatron
from oracle_model import EXPERTS, Model, Param, Refused, model_of, need, ranks_of, rounded_up
from oracle_placement import expert_coordinates, megatron_coordinates, megatron_placement
from oracle_values import FP32, is_nan, values
from oracle_vllm import expert_slots, vllm, vllm_partition

__all__ = [
    "EXPERTS", "FP32", "Model", "Param", "Refused", "expert_coordinates", "expert_slots", "is_nan", "megatron_coordinates",
    "megatron_placement", "model_of", "need", "params", "ranks_of", "rounded_up", "values", "vllm_partition",
]  # fmt: skip


def hf(model, side, own, role):
    return [Param(model, role, 0, name, model[name], (name,)) for name in model.shapes]


FRAMEWORKS = {"megatron": megatron, "vllm": vllm, "hf": hf}


def params(spec, role, rank, model=None):
    """The parameters that a rank of the communicator holds as "source" or "target" of a spec. `model`: model_of(spec), if it is there already."""
    side = spec[role]
    ranks = ranks_of(side)
    if rank not in ranks:
        return []
    return FRAMEWORKS[side["framework"]](model or model_of(spec), side, ranks.index(rank), role)
