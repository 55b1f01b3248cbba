"""All tests of presets, or the parts named: main.py [--oracle | --syncs] [PART ...]

RESHARD_LIBRARY is the library, as for reshard.py. --oracle: only what needs no library. --syncs: only what moves weights, which with
RESHARD_MEMORY=cuda lie in GPUs' memory (memory.py). Each part says in a line or two what it did;
several run beside each other, as many as there are cores.
"""

import importlib
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

ORACLE = ("goldens", "vectors", "expert_vectors", "attention_vectors", "vision_vectors", "value_vectors", "oracle_coverage")
SYNCS = (
    "goldens", "vectors", "expert_vectors", "attention_vectors", "vision_vectors", "changes", "mindspeed", "gpt_oss", "variants", "matrix",
    "random_worlds",
)  # fmt: skip
PARTS = (*ORACLE, "refusals", "published", "changes", "mindspeed", "gpt_oss", "variants", "matrix", "random_worlds")


def run(name):
    began = time.monotonic()
    try:
        importlib.import_module(name).main()
        print(f"{name}: ok, {time.monotonic() - began:.1f} s", flush=True)
        return True
    except Exception:
        traceback.print_exc()
        print(f"{name}: FAILED", flush=True)
        return False


def in_a_process(name):
    done = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    return done.returncode == 0


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("--")] or PARTS
    for name in names:
        if name not in PARTS:
            sys.exit(f"no part '{name}'; there are {', '.join(PARTS)}")
    if "--oracle" in sys.argv:
        names = [name for name in names if name in ORACLE]
    if "--syncs" in sys.argv:
        names = [name for name in names if name in SYNCS]
    if len(names) == 1:
        sys.exit(0 if run(names[0]) else 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(0 if all(list(pool.map(in_a_process, names))) else 1)


if __name__ == "__main__":
    main()
