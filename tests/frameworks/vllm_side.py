"""One rank of a real vLLM model on CPU, and a second one that shows what the first must come to hold.

Both are as they are once vLLM has read a checkpoint: what its CPU backend then does for its own kernels, it does to neither.
"""

import torch
from vllm.config import DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from weights import bits

UNTOUCHED = 0xFFFF  # no tensor has these bits


class Engine:
    def __init__(self, side, rank, folder):
        """`folder` holds the model's config.json."""
        tp, pp = side.get("tensor_parallel_size", 1), side.get("pipeline_parallel_size", 1)
        sizes = {
            "tensor_parallel_size": tp,
            "pipeline_parallel_size": pp,
            "data_parallel_size": side.get("data_parallel_size", 1),
            "data_parallel_rank": rank // (tp * pp),
            "enable_expert_parallel": side.get("enable_expert_parallel", False),
        }
        self.models = []
        for _ in ("serving", "expected"):
            vllm_config = VllmConfig(
                model_config=ModelConfig(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True),
                parallel_config=ParallelConfig(**sizes),
                device_config=DeviceConfig("cpu"),
            )
            with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
                if not self.models:
                    init_distributed_environment(tp * pp, rank % (tp * pp), local_rank=rank, backend="gloo")
                    initialize_model_parallel(tp, pp)
                self.models.append(initialize_model(vllm_config))
        for model in self.models:
            for p in model.parameters():
                bits(p)[...] = UNTOUCHED
        self.serving, self.expected = (dict(model.named_parameters()) for model in self.models)

    def load_serving(self, hugging_face):
        self._load(0, hugging_face)

    def load_expected(self, hugging_face):
        self._load(1, hugging_face)

    def _load(self, which, hugging_face):
        loaded = self.models[which].load_weights(iter(hugging_face.items()))
        params = (self.serving, self.expected)[which]
        left = [name for name, p in params.items() if name not in loaded or (bits(p) == UNTOUCHED).any()]
        assert not left, f"vLLM's load_weights leaves out {left}"

    def check_stale(self):
        """Before a sync every element is wrong, but padding, which is zero."""
        for name, want in self.expected.items():
            same = bits(self.serving[name]) == bits(want)
            assert not bits(want)[same].any(), f"{name} is partly right before anything was moved"

    def check(self):
        """Compares every byte; answers how many."""
        wrong, size = [], 0
        assert self.serving.keys() == self.expected.keys()
        for name, want in self.expected.items():
            got, want = bits(self.serving[name]), bits(want)
            size += want.nbytes
            at = (got != want).nonzero()
            if len(at[0]):
                first = tuple(int(axis[0]) for axis in at)
                wrong.append(f"{name} {want.shape}: {len(at[0])} elements, the first at {first}: {got[first]:#06x} instead of {want[first]:#06x}")
        if wrong:
            raise AssertionError(f"{len(wrong)} of {len(self.expected)} parameters differ from vLLM's own: " + "; ".join(wrong))
        return size
