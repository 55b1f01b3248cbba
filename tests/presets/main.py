"""All tests of presets, or the parts named: main.py [--oracle | --syncs] [PART ...]

RESHARD_LIBRARY is the library, as for reshard.py. --oracle: only what needs no library. --syncs: only what moves weights, which with
RESHARD_MEMORY=cuda lie in GPUs' memory (memory.py). Each part says in a line or two what it did.
"""

import importlib
import sys
import time
import traceback

ORACLE = ("goldens", "vectors", "expert_vectors", "attention_vectors", "vision_vectors", "value_vectors", "oracle_coverage")
SYNCS = (
    "goldens", "vectors", "expert_vectors", "attention_vectors", "vision_vectors", "changes", "mindspeed", "gpt_oss", "variants", "matrix",
    "random_worlds",
)  # fmt: skip
PARTS = (*ORACLE, "refusals", "published", "changes", "mindspeed", "gpt_oss", "variants", "matrix", "random_worlds")


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("--")] or PARTS
    failed = []
    for name in names:
        if name not in PARTS:
            sys.exit(f"no part '{name}'; there are {', '.join(PARTS)}")
        if ("--oracle" in sys.argv and name not in ORACLE) or ("--syncs" in sys.argv and name not in SYNCS):
            continue
        began = time.monotonic()
        try:
            importlib.import_module(name).main()
            print(f"{name}: ok, {time.monotonic() - began:.1f} s", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            failed.append(name)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
