"""Megatron-core's own model-swap matrix in real processes: one process a rank, over rs_comm_local.

Both jobs are on the same ranks, as in Megatron's test. Every dense case runs a second time from the "local" to the TE layer spec; every
case with experts goes from TEGroupedMLP to SequentialMLP, on as many ranks as each side needs, and to legacy GroupedMLP, with replicas
on all ranks of the larger side. One job casts its weights, whatever way they travel. The cases with shared experts run with a gate of theirs, and with the routers' correction biases and a layer for
multi-token prediction. Last, 16 processes at once, from a trainer to engines. A process that has not ended in time is a failure, and is ended.

RESHARD_MATRIX: of the cases only those with one of these words in their titles, separated by commas.
"""

import json
import math
import os
import secrets
import subprocess
import sys
import time

PATIENCE = 60  # seconds for a case; the library's own deadlines are shorter
# (TP, PP) of the source, (TP, PP) of the target.
CASES = [
    ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (4, 1)), ((1, 2), (1, 1)), ((1, 1), (1, 2)), ((2, 2), (1, 1)),
    ((1, 1), (2, 2)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((1, 2), (2, 4)),
]  # fmt: skip
# The same with EP in third place: experts alone, then with shared ones.
EXPERT_CASES = [
    ((1, 1, 2), (1, 1, 4)), ((1, 1, 2), (1, 1, 1)), ((1, 1, 1), (1, 1, 2)), ((1, 1, 2), (1, 2, 2)), ((2, 1, 2), (1, 1, 1)),
    ((1, 1, 1), (2, 1, 2)), ((4, 1, 1), (2, 1, 2)), ((2, 1, 2), (4, 1, 1)), ((4, 1, 1), (1, 1, 4)), ((1, 1, 4), (4, 1, 1)),
]  # fmt: skip
SHARED_CASES = [((1, 1, 2), (1, 1, 1)), ((2, 1, 2), (1, 1, 1)), ((1, 1, 1), (2, 1, 2))]
MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {
    **MODEL,
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 4,
    "num_experts": 4,
    "moe_intermediate_size": 48,
}
SHARED = {**EXPERTS, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 64}
# Shared experts, a correction bias of the router and a layer for multi-token prediction.
PREDICTING = {
    **MODEL, "architectures": ["Glm4MoeForCausalLM"], "head_dim": 4, "n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
}  # fmt: skip
MTP = {"mtp_num_layers": 1}
LOCAL_READ, LOCAL_RING = 1, 2  # RS_LOCAL_READ, RS_LOCAL_RING
GROUPED, LEGACY = {"moe_grouped_gemm": True}, {"moe_use_legacy_grouped_gemm": True}


def side(sizes, first, spec, ranks=None, **more):
    tp, pp, *ep = sizes
    ranks = ranks or tp * pp * (ep[0] if ep else 1)
    return {
        "framework": "megatron", "ranks": f"{first}-{first + ranks - 1}", "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, "transformer_impl": spec, **({"expert_model_parallel_size": ep[0]} if ep else {}), **more,
    }  # fmt: skip


def cases():
    """Title, spec, and flags of rs_comm_local_t."""
    for title, spec in moves():
        yield title, spec, 0
    casts = {
        "model": MODEL,
        "source": side((2, 1), 0, "transformer_engine", params_dtype="float32", layernorm_zero_centered_gamma=True),
        "target": side((1, 2), 2, "local"),
    }
    yield "casts", casts, 0
    yield "casts through rings", casts, LOCAL_RING
    if may_read():
        yield "casts beside reads", casts, LOCAL_READ


def may_read():
    """Whether processes may read each other's memory here."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            scope = int(file.read())
            return scope == 0 or (os.geteuid() == 0 and scope < 3)
    except FileNotFoundError:
        return True


def moves():
    for source, target in CASES:
        for specs in (("transformer_engine", "local"), ("local", "transformer_engine")):
            spec = {"model": MODEL, "source": side(source, 0, specs[0]), "target": side(target, 0, specs[1])}
            yield f"TP {source[0]} PP {source[1]} to TP {target[0]} PP {target[1]}", spec
    spec = {"model": MODEL, "source": side((2, 1), 0, "local"), "target": side((2, 1), 2, "local")}
    yield "TP 2 to TP 2 on other ranks", spec
    te = "transformer_engine"
    for model, table, more in ((EXPERTS, EXPERT_CASES, {}), (SHARED, SHARED_CASES, {}), (PREDICTING, SHARED_CASES, MTP)):
        for source, target in table:
            title = f"{model['architectures'][0]}, TP, PP, EP {source} to {target}"
            spec = {"model": model, "source": side(source, 0, te, **GROUPED, **more), "target": side(target, 0, te, **more)}
            yield title, spec
            ranks = max(math.prod(source), math.prod(target))
            spec = {
                "model": model,
                "source": side(source, 0, te, ranks, **GROUPED, **more),
                "target": side(target, 0, te, ranks, **LEGACY, **more),
            }
            yield f"{title}, legacy", spec
    # 4 stages of 2 TP ranks, each twice, to 4 ranks of TP with 4 times the data, where every rank has one expert of 16.
    spec = {
        "model": {**PREDICTING, "n_routed_experts": 16},
        "source": side((2, 4, 2), 0, te, 16, **GROUPED, **MTP),
        "target": {
            "framework": "vllm", "ranks": "0-15", "tensor_parallel_size": 4, "data_parallel_size": 4, "enable_expert_parallel": True,
            "mtp_drafter": True,
        },
    }  # fmt: skip
    yield "16 processes", spec


def rank_main(name, rank, world, flags, waiting, closed, text):
    """One rank: the process that main() starts. The last numbers are the ends of a pipe, which ends when all ranks have closed theirs."""
    import memory
    import oracle
    import worlds
    from worlds import reshard

    memory.between_processes = True
    spec = json.loads(text)
    mine = worlds.Rank(spec, rank, oracle.model_of(spec))
    preset = mine.make_preset()
    comm = reshard.LocalComm(name, rank, world, flags)
    container = memory.Container(preset, comm, f"rank {rank}", worlds.TIMEOUT_MS)
    container.connect()
    got, expected = container.sync(1)["bytes"], mine.expected_bytes()
    mine.check_targets()
    for what, count in expected.items():
        worlds.check(got[what] == count, f"{got[what]} bytes {what} instead of {count}")
    container.close()
    os.close(closed)
    os.read(waiting, 1)  # what another process has open may not be freed
    comm.close()
    preset.close()
    print("ok")


def run(title, spec, flags):
    world = 1 + max(rank_of_last(spec[role]["ranks"]) for role in ("source", "target"))
    name, text = f"presets-{secrets.token_hex(8)}", json.dumps(spec)
    command = [sys.executable, os.path.abspath(__file__), name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    gate = os.pipe()
    numbers = [[str(number) for number in (rank, world, flags, *gate)] for rank in range(world)]
    processes = [subprocess.Popen([*command, *mine, text], pass_fds=gate, **pipes) for mine in numbers]
    for end in gate:
        os.close(end)
    deadline = time.monotonic() + PATIENCE
    failures = []
    for rank, process in enumerate(processes):
        try:
            said, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode != 0 or said.strip() != "ok":
                failures.append(f"rank {rank} ended with {process.returncode}: {said.strip()[-2000:]}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failures.append(f"rank {rank} was not done after {PATIENCE} seconds")
    if failures:
        raise AssertionError("\n".join([f"{title} ({text})", *failures]))


def rank_of_last(ranks):
    return int(ranks.split("-")[1])


def main():
    words, count = os.environ.get("RESHARD_MATRIX", "").split(","), 0
    for title, spec, flags in cases():
        if any(word in title for word in words):
            run(title, spec, flags)
            count += 1
    if not count:
        raise AssertionError(f"no case's title has any of {words} in it")
    print(f"matrix: {count} cases in processes of their own")


if __name__ == "__main__":
    if len(sys.argv) == 8:
        rank_main(sys.argv[1], *map(int, sys.argv[2:7]), sys.argv[7])
    else:
        main()
