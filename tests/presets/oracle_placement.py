"""Which layers and which experts a Megatron rank has: a part of the oracle (oracle.py)."""

import re

from oracle_model import need, numbers, ranks_of


def megatron_coordinates(side, own):
    """tp, cp, dp and pp rank of the framework's rank `own`."""
    tp, cp = side.get("tensor_model_parallel_size", 1), side.get("context_parallel_size", 1)
    pp, world = side.get("pipeline_model_parallel_size", 1), len(ranks_of(side))
    dp = side.get("data_parallel_size", world // (tp * cp * pp))
    need(tp * cp * pp * dp == world, "ranks")
    rest = own // (tp * cp)
    dp_pp = (rest // pp, rest % pp) if side.get("use_tp_pp_dp_mapping") else (rest % dp, rest // dp)
    return {"tp": own % tp, "cp": own // tp % cp, "dp": dp_pp[0], "pp": dp_pp[1]}


def expanded(text):
    """The entries of a pipeline layout, a string of E, t, m, L each."""
    text = text.replace(",", "")

    def repeat(match):
        return match[1] * int(match[2] or 1)

    text = re.sub(r"\(([^()]*)\)(?:\*(\d+))?", repeat, text)
    return re.sub(r"([EtmL])\*(\d+)", repeat, text).split("|")


def megatron_placement(side, layers):
    """What each (pp, chunk) holds: the layers, None for a no-op; and where embedding and output are."""
    pp, vpp = side.get("pipeline_model_parallel_size", 1), side.get("virtual_pipeline_model_parallel_size") or 1
    noops = numbers(side.get("noop_layers"))
    slots, real = [], iter(range(layers))
    for slot in range(layers + len(noops)):
        slots.append(None if slot in noops else next(real, None))
    need(all(0 <= noop < len(slots) for noop in noops) and len(set(noops)) == len(noops), "noop_layers")
    total = len(slots)

    if layout := side.get("pipeline_model_parallel_layout"):
        need(not side.get("mtp_num_layers"), "pipeline_model_parallel_layout")  # it would say where they are
        entries = expanded(layout)
        need(len(entries) % pp == 0, "pipeline_model_parallel_layout")
        chunks = len(entries) // pp
        need(vpp in (1, chunks), "virtual_pipeline_model_parallel_size")
        held = [[symbol for symbol in entry if symbol == "t"] for entry in entries]
        need(sum(map(len, held)) == total, "pipeline_model_parallel_layout")
        at = [(i % pp, i // pp) for i in range(len(entries))]
        ends = [next((a for a, entry in zip(at, entries) if symbol in entry), None) for symbol in "EL"]
        need(ends == [(0, 0), (pp - 1, chunks - 1)], "pipeline_model_parallel_layout")
        sizes = {a: len(h) for a, h in zip(at, held)}
    else:
        chunks = vpp
        need(chunks == 1 or pp > 1, "virtual_pipeline_model_parallel_size")
        first, last = side.get("num_layers_in_first_pipeline_stage"), side.get("num_layers_in_last_pipeline_stage")
        emb = int(side.get("account_for_embedding_in_pipeline_split", False))
        loss = int(side.get("account_for_loss_in_pipeline_split", False))
        if sizes := numbers(side.get("num_layer_list")):
            need(len(sizes) == pp and sum(sizes) == total and chunks == 1, "num_layer_list")
            need(first is last is None and not emb and not loss, "num_layer_list")
        else:
            given = {0: first, pp - 1: last}
            given = {stage: size for stage, size in given.items() if size is not None}
            need(not given or not (emb or loss), "account_for")
            need(pp > 1 or not given, "pipeline_model_parallel_size")
            rest, stages = total + emb + loss - sum(given.values()), pp - len(given)
            need(rest % stages == 0 if stages else rest == 0, "pipeline_model_parallel_size")
            even = rest // stages if stages else 0
            sizes = [given.get(stage, even) for stage in range(pp)]
            need(min(sizes) > 0, "pipeline_model_parallel_size")
        need(all(size % chunks == 0 for size in sizes), "virtual_pipeline_model_parallel_size")
        sizes = {(p, c): sizes[p] // chunks for c in range(chunks) for p in range(pp)}
        sizes[0, 0] -= emb
        sizes[pp - 1, chunks - 1] -= loss
        need(min(sizes.values()) >= 0, "account_for")

    placed, at = {}, 0
    for c in range(chunks):
        for p in range(pp):
            placed[p, c] = slots[at : at + sizes[p, c]]
            at += sizes[p, c]
    return placed, (0, 0), (pp - 1, chunks - 1)


def expert_coordinates(side, own):
    """Rank `own` holds part "etp" of `etp` of the experts of part "ep" of `ep`."""
    tp, cp = side.get("tensor_model_parallel_size", 1), side.get("context_parallel_size", 1)
    pp, ep = side.get("pipeline_model_parallel_size", 1), side.get("expert_model_parallel_size", 1)
    etp = side.get("expert_tensor_parallel_size") or tp
    need(len(ranks_of(side)) % (etp * ep * pp) == 0, "ranks")
    need(not side.get("use_tp_pp_dp_mapping") or etp * ep == tp * cp, "use_tp_pp_dp_mapping")
    if side.get("moe_tp_extend_ep"):  # MindSpeed: TP ranks have experts of their own
        need("expert_tensor_parallel_size" not in side, "expert_tensor_parallel_size")
        return {"etp": 0, "ep": own % (tp * ep)}, 1, tp * ep
    return {"etp": own % etp, "ep": own // etp % ep}, etp, ep
