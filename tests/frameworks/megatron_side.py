"""One rank of a real Megatron-core model on CPU.

Weights come in by Megatron's own word: what its checkpoints would call each shard, and where in the whole tensor it lies. Only the
names, and how query, key and value heads stand in linear_qkv, are told here.
"""

import re
import warnings

import torch
from weights import bits

warnings.filterwarnings("ignore", module="megatron")
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # where stages tie their embeddings; gloo then does what NCCL would

PADDING, UNTOUCHED = 0x7777, 0xFFFF  # no tensor has these bits

MODEL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
MLP = {"linear_fc1.weight_w": "gate_proj.weight", "linear_fc1.weight_v": "up_proj.weight", "linear_fc2.weight": "down_proj.weight"}


def whole(key, config, hugging_face):
    """The tensor that Megatron's checkpoints have under this key."""
    if key in MODEL:
        return hugging_face[MODEL[key]]
    layer, rest = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", key).groups()
    prefix = f"model.layers.{layer}."
    if rest in LAYER:
        return hugging_face[prefix + LAYER[rest]]
    if rest == "self_attention.linear_qkv.weight":
        # Of each query group: its query heads, its key head, its value head.
        groups, d = config["num_key_value_heads"], config["head_dim"]
        q, k, v = (hugging_face[f"{prefix}self_attn.{x}_proj.weight"].view(groups, -1, d, config["hidden_size"]) for x in "qkv")
        return torch.cat((q, k, v), 1).flatten(0, 2)
    expert, part = re.fullmatch(r"mlp\.(?:experts\.experts\.(\d+)\.)?(.*)", rest).groups()
    return hugging_face[f"{prefix}mlp.{'' if expert is None else f'experts.{expert}.'}{MLP[part]}"]


class Trainer:
    def __init__(self, config, side):
        self.config = config
        size = side.get
        tp, pp = size("tensor_model_parallel_size", 1), size("pipeline_model_parallel_size", 1)
        vpp = size("virtual_pipeline_model_parallel_size")
        others = {
            "expert_model_parallel_size": size("expert_model_parallel_size", 1),
            "expert_tensor_parallel_size": size("expert_tensor_parallel_size"),
        }
        order = "tp-cp-ep-pp-dp" if size("use_tp_pp_dp_mapping") else "tp-cp-ep-dp-pp"
        parallel_state.initialize_model_parallel(tp, pp, vpp, order=order, **others)
        experts = config.get("num_experts")
        moe = {"num_moe_experts": experts, "moe_ffn_hidden_size": config["moe_intermediate_size"], "moe_router_topk": 2} if experts else {}
        model_config = TransformerConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config["head_dim"],
            ffn_hidden_size=config["intermediate_size"],
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            qk_layernorm=True,
            normalization="RMSNorm",
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            num_layers_in_first_pipeline_stage=size("num_layers_in_first_pipeline_stage"),
            **others,
            **moe,
        )
        multiple = side["make_vocab_size_divisible_by"] * tp  # as Megatron's training script pads
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.chunks = []
        for chunk in range(vpp or 1):
            model = GPTModel(
                model_config,
                get_gpt_layer_local_spec(experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"),
                vocab_size=-(-config["vocab_size"] // multiple) * multiple,
                max_sequence_length=config["max_position_embeddings"],
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == pp - 1 and chunk == (vpp or 1) - 1,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=config["tie_word_embeddings"],
                vp_stage=chunk if vpp else None,
            )
            self.chunks.append(Float16Module(model_config, model))

    def parameters(self):
        """Chunk, name and tensor of each."""
        return [(chunk, name, p) for chunk, module in enumerate(self.chunks) for name, p in module.named_parameters()]

    @torch.no_grad()
    def load(self, hugging_face):
        """New weights, where the old ones lie; padding of the vocabulary becomes rubbish."""
        for _, _, p in self.parameters():
            bits(p)[...] = UNTOUCHED
        for module in self.chunks:
            shards = module.module.sharded_state_dict(metadata={"singleton_local_shards": True})
            apply_factories(shards)
            for shard in nested_values(shards):
                if isinstance(shard, ShardedTensor):
                    self._fill(shard, whole(shard.key, self.config, hugging_face))
        left = [name for _, name, p in self.parameters() if (bits(p) == UNTOUCHED).any()]
        assert not left, f"Megatron's checkpoint leaves elements out: {left}"

    @staticmethod
    def _fill(shard, tensor):
        assert shard.allow_shape_mismatch or tuple(shard.global_shape) == tuple(tensor.shape), shard
        padded = torch.empty(shard.global_shape, dtype=torch.bfloat16)
        bits(padded)[...] = PADDING
        padded[: len(tensor)] = tensor
        box = tuple(slice(start, start + n) for start, n in zip(shard.global_offset, shard.local_shape, strict=True))
        shard.data.copy_(padded[box])
