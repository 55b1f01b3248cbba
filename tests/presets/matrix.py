"""Megatron-core's own model-swap matrix in real processes: one process a rank, over rs_comm_local.

Both jobs are on the same ranks, as in Megatron's test. Every dense case runs a second time from the "local" to the TE layer spec; every
case with experts goes from TEGroupedMLP to SequentialMLP, on as many ranks as each side needs, and to legacy GroupedMLP, with replicas
on all ranks of the larger side. A process that has not ended in time is a failure, and is ended.
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
GROUPED, LEGACY = {"moe_grouped_gemm": True}, {"moe_use_legacy_grouped_gemm": True}


def side(sizes, first, spec, ranks=None, **more):
    tp, pp, *ep = sizes
    ranks = ranks or tp * pp * (ep[0] if ep else 1)
    return {
        "framework": "megatron", "ranks": f"{first}-{first + ranks - 1}", "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, "transformer_impl": spec, **({"expert_model_parallel_size": ep[0]} if ep else {}), **more,
    }  # fmt: skip


def cases():
    for source, target in CASES:
        for specs in (("transformer_engine", "local"), ("local", "transformer_engine")):
            spec = {"model": MODEL, "source": side(source, 0, specs[0]), "target": side(target, 0, specs[1])}
            yield f"TP {source[0]} PP {source[1]} to TP {target[0]} PP {target[1]}", spec
    spec = {"model": MODEL, "source": side((2, 1), 0, "local"), "target": side((2, 1), 2, "local")}
    yield "TP 2 to TP 2 on other ranks", spec
    te = "transformer_engine"
    for model, table in ((EXPERTS, EXPERT_CASES), (SHARED, SHARED_CASES)):
        for source, target in table:
            title = f"{model['architectures'][0]}, TP, PP, EP {source} to {target}"
            spec = {"model": model, "source": side(source, 0, te, **GROUPED), "target": side(target, 0, te)}
            yield title, spec
            ranks = max(math.prod(source), math.prod(target))
            spec = {
                "model": model,
                "source": side(source, 0, te, ranks, **GROUPED),
                "target": side(target, 0, te, ranks, **LEGACY),
            }
            yield f"{title}, legacy", spec


def rank_main(name, rank, world, text):
    """One rank: the process that main() starts."""
    import oracle
    import worlds
    from worlds import reshard

    spec = json.loads(text)
    mine = worlds.Rank(spec, rank, oracle.model_of(spec))
    preset = mine.make_preset()
    comm = reshard.LocalComm(name, rank, world)
    container = reshard.Container(preset, comm, f"rank {rank}", worlds.TIMEOUT_MS)
    container.connect()
    got, expected = container.sync(1)["bytes"], mine.expected_bytes()
    mine.check_targets()
    for what, count in expected.items():
        worlds.check(got[what] == count, f"{got[what]} bytes {what} instead of {count}")
    container.close()
    comm.close()
    preset.close()
    print("ok")


def run(title, spec):
    world = 1 + max(rank_of_last(spec[role]["ranks"]) for role in ("source", "target"))
    name, text = f"presets-{secrets.token_hex(8)}", json.dumps(spec)
    command = [sys.executable, os.path.abspath(__file__), name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(world), text], **pipes) for rank in range(world)]
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
    count = 0
    for title, spec in cases():
        run(title, spec)
        count += 1
    print(f"matrix: {count} cases in processes of their own")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        rank_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
