"""What RS_DESCRIBE_WORLD says of a world, against the sum of what the oracle and all ranks' own plans say."""

import collections

from oracle import megatron_coordinates, ranks_of

STAGING = 256 << 20  # the default of rs_comm_config_t


def stages(side):
    """Stage of each rank of a side of a spec."""

    def stage(own):
        if side["framework"] == "megatron":
            return megatron_coordinates(side, own)["pp"]
        return own // side.get("tensor_parallel_size", 1) % side.get("pipeline_parallel_size", 1)

    return {rank: stage(own) for own, rank in enumerate(ranks_of(side))}


def naive_rounds(left, message):
    """How many rounds there are, a message of each pair in each, and the sum of what each round's busiest rank sends or receives."""
    rounds = slowest = 0
    while left:
        now = collections.Counter()
        for (source, target), count in left.items():
            now["out", source] += min(count, message)
            now["in", target] += min(count, message)
        left = {pair: count - message for pair, count in left.items() if count > message}
        rounds, slowest = rounds + 1, slowest + max(now.values())
    return rounds, slowest


def expected(spec, elements, plans, by_rank, landed):
    """`plans`: RS_DESCRIBE_PLAN of all ranks. `by_rank`: bytes that each rank's sync moves, by kind, as the oracle counts them.

    `landed`: bytes that sources have of what all targets hold.
    """
    per_host, links = spec.get("ranks_per_host"), spec.get("link_gb_per_s")
    at = {side: stages(spec[side]) for side in ("source", "target")}
    pairs = collections.defaultdict(lambda: [0, 0])
    egress, ingress = ({stage: collections.Counter() for stage in at[side].values()} for side in at)
    for side, sums in (("source", egress), ("target", ingress)):
        for rank, stage in at[side].items():
            sums[stage][rank] = 0
    busiest, seconds = 0, 0.0
    for plan in plans:
        rank, rates = plan["rank"], collections.Counter()
        for peer in plan["peers"]:
            to, near = peer["rank"], per_host is None or rank // per_host == peer["rank"] // per_host
            if peer["sent"]:
                row = pairs[at["source"][rank], at["target"][to], "same_host" if near else "network"]
                row[0] += 1
                row[1] += peer["sent"]
                egress[at["source"][rank]][rank] += peer["sent"]
                ingress[at["target"][to]][to] += peer["sent"]
            for way in ("sent", "received"):
                rates["same_host" if near else "network", way] += peer[way]
                busiest = max(busiest, sum(p[way] for p in plan["peers"]))
        if links:
            seconds = max([seconds, *(count / (links[link] * 1e9) for (link, _), count in rates.items())])
    moved, peers = sum(b["received"] for b in by_rank.values()), max(len(plan["peers"]) for plan in plans)
    message = STAGING // (4 * max(peers, 1)) // 256 * 256
    rounds, slowest = naive_rounds({(plan["rank"], p["rank"]): p["sent"] for plan in plans for p in plan["peers"] if p["sent"]}, message)

    def balance(sums):
        line = lambda stage, ranks: {  # noqa: E731
            "stage": stage, "ranks": len(ranks), "bytes": sum(ranks.values()), "busiest": max(ranks.values()),
            "mean": sum(ranks.values()) // len(ranks),
        }  # fmt: skip
        return [line(*item) for item in sorted(sums.items())]

    whole = {
        "parameters": elements,
        "ranks": 1 + max(max(at[side]) for side in at),
        "bytes": {"landed": landed, "sent": moved, "received": moved},
        "pairs": [
            {"source_stage": source, "target_stage": target, "tier": tier, "pairs": count, "bytes": size}
            for (source, target, tier), (count, size) in sorted(pairs.items(), key=lambda p: (p[0][:2], p[0][2] == "network"))
        ],
        "egress": balance(egress),
        "ingress": balance(ingress),
        "most_peers": peers,
        "message_bytes": message,
        "staging_bytes": 4 * peers * message,
        "rounds": rounds,
        "rounds_over_busiest": slowest / busiest if busiest else 1.0,
    }
    return whole | ({"seconds": seconds} if links else {})
