"""What presets must refuse, and what the error must name. Nothing is approximated: what a framework forbids is an error here."""

import ctypes as c
import json
import re
import time

import numpy as np
import oracle
import worlds
from refused_specs import (
    ACCEPTED,
    DEEPSEEK,
    DEFAULTS,
    EP,
    HF,
    LEGACY,
    MODEL,
    NOT_BUILT,
    ONE_WAY,
    PP,
    QWEN,
    SPECS,
    TP,
    VPP,
    V_TP,
    megatron,
    sized,
    spec,
    vllm,
)
from worlds import SOURCE, TARGET, reshard

INVALID, UNSUPPORTED, NOT_FOUND, LAYOUT, MISMATCH = -1, -3, -4, -20, -22


def says(text, words):
    return all(any(w in text for w in (word if isinstance(word, tuple) else (word,))) for word in words)


failures = []  # all of them are told at the end


def refused(what, call, statuses, *words):
    """The call must fail, with one of the statuses and a text that names the words."""
    try:
        call()
    except reshard.Error as error:
        if error.status in statuses and says(str(error), words):
            return True
        failures.append(f"{what}: should be one of {statuses} and name {words}: {error}")
    else:
        failures.append(f"{what}: was not refused; should name {words}")
    return False


def brief(wrong):
    """What is special in a spec."""
    special = {key: value for key, value in wrong.items() if value != HF and key != "model"}
    model = wrong.get("model", {})
    special = {key: value if len(str(value)) < 200 else "..." for key, value in special.items()}
    special["model"] = {k: model.get(k) for k in sorted(MODEL.keys() | model.keys()) if model.get(k) != MODEL.get(k)}
    return json.dumps(special)


def create(text, rank):
    handle = c.c_void_p()
    reshard._check(reshard._lib.rs_preset_create(text, rank, c.byref(handle)))
    reshard._lib.rs_preset_destroy(handle)


def check_specs():
    count = 0
    for statuses, table in (((INVALID, UNSUPPORTED), SPECS), ((UNSUPPORTED,), NOT_BUILT)):
        for wrong, *words in table:
            other = dict(wrong)  # the same on the other side
            if "source" in other and "target" in other:
                other["source"], other["target"] = other["target"], other["source"]
            for text, rank in ((wrong, 0), (wrong, 40), (other, 0)):  # also a rank that has no part
                if not refused(brief(text), lambda: create(json.dumps(text).encode(), rank), statuses, *words):
                    break
            count += 1
    for wrong, *words in ONE_WAY:
        refused(brief(wrong), lambda: create(json.dumps(wrong).encode(), 0), (INVALID, UNSUPPORTED), *words)
        count += 1
    for text in twice():
        refused(text[:80], lambda: create(text, 0), (INVALID,), "twice")
        count += 1
    for text in (
        b"[" * 100000,
        b"",
        b"{",
        b"[]",
        b"null",
        b"{} {}",
        b"\xff",
        b'{"model": 1, "source": 2, "target": 3}',
    ):
        refused(text, lambda: create(text, 0), (INVALID,))
        count += 1
    refused("no spec", lambda: create(None, 0), (INVALID,))
    refused("rank 2^31 - 1", lambda: create(json.dumps(spec()).encode(), (1 << 31) - 1), (INVALID,), "rank")
    refused("rank -1", lambda: create(json.dumps(spec()).encode(), -1), (INVALID,), "rank")
    status = reshard._lib.rs_preset_create(json.dumps(spec()).encode(), 0, None)
    assert status == INVALID, status
    ignored = sized(attention_bias=False, mlp_bias=False, attention_dropout=0.0, my_own_member=[1])
    create(json.dumps(spec(model=ignored)).encode(), 0)
    return count + 4


def twice():
    """Specs with a member given twice: of the spec, of a side, of the model, of what is ignored."""
    text = json.dumps(spec(model=sized(rope_scaling={"factor": 2})))
    for member in ('"hidden_size": 16', '"framework": "hf"', '"factor": 2', f'"source": {json.dumps(HF)}'):
        yield text.replace(member, f"{member}, {member}", 1).encode()


def check_accepted():
    for right in ACCEPTED:
        try:
            create(json.dumps(right).encode(), 0)
        except reshard.Error as error:
            failures.append(f"{brief(right)}: was refused: {error}")
    return len(ACCEPTED)


def check_ignore():
    """Patterns that a careless matcher needs ages for."""
    for pattern in ("*a" * 30 + "b", "*a" * 3000 + "b", "*" * 10000 + "b", "a*" * 3000 + "b"):
        preset = reshard.Preset(spec(ignore=[pattern]), 0)
        began = time.monotonic()
        array = np.zeros(2, np.uint16)
        refused("a name of many a", lambda: preset.bind("a" * 20000, array, SOURCE), (NOT_FOUND,))
        preset.bind("a" * 20000 + "b", array, SOURCE)
        preset.close()
        if (seconds := time.monotonic() - began) > 2:
            failures.append(f"'{pattern[:20]}...' took {seconds:.1f} s to match")
    return 4


def bind_struct(param, array, model, **changes):
    """rs_bind_t of a right binding, but for the changes."""
    shape = (c.c_int64 * 8)(*array.shape)
    fields = {
        "name": param.name.encode(), "role": SOURCE, "model_chunk": param.chunk, "data": array.ctypes.data, "size_bytes": array.nbytes,
        "device_type": reshard.CPU, "dtype": reshard.Dtype(*model.dtype), "ndim": array.ndim, "shape": shape,
    }  # fmt: skip
    return reshard._sized(reshard.BindStruct, **{**fields, **changes})


def check_binds():
    """One parameter bound wrongly in every way; then all rightly, so that nothing was left behind."""
    s = spec(megatron(2, **{PP: 2, VPP: 2}), {**HF, "ranks": [2]}, ignore=["*.rotary_emb.inv_freq", "extra"])
    rank = worlds.Rank(s, 0, oracle.Model(s["model"]))
    preset = reshard.Preset(s, 0)
    param = next(p for p in rank.params["source"] if p.name == "decoder.layers.0.self_attention.linear_proj.weight")
    array = rank.memory["source"][param.key]
    count = 0

    def bind(**changes):
        struct = bind_struct(param, array, rank.model, **changes)
        reshard._check(reshard._lib.rs_preset_bind(preset._handle, c.byref(struct)))

    def dims(*values):
        return (c.c_int64 * 8)(*values)

    name = param.name
    refusals = [
        ((NOT_FOUND,), {"name": b"decoder.layers.0.self_attention.linear_prj.weight"}, ("linear_prj", name)),
        (
            (NOT_FOUND,),
            {"name": b"decoder.layers.7.self_attention.linear_proj.weight"},
            ("decoder.layers.7", "decoder.layers.0"),
        ),
        ((NOT_FOUND,), {"name": b"decoder.layers.0.self_attention.rotary.inv_freq"}, ("rotary.inv_freq",)),
        (
            (NOT_FOUND,),
            {"name": b"embedding.word_embeddings.weight", "model_chunk": 1},
            ("embedding.word_embeddings.weight", "chunk"),
        ),
        ((NOT_FOUND, INVALID), {"model_chunk": 2}, (name, "chunk")),
        ((NOT_FOUND, INVALID, LAYOUT), {"role": TARGET}, (name,)),
        ((NOT_FOUND, INVALID, LAYOUT), {"role": SOURCE | TARGET}, (name,)),
        ((INVALID,), {"role": 0}, ("role",)),
        ((INVALID,), {"role": 4}, ("role",)),
        ((LAYOUT,), {"shape": dims(16, 15)}, (name, "15", "16")),
        ((LAYOUT,), {"shape": dims(16), "ndim": 1}, (name, "16")),
        ((LAYOUT,), {"dtype": reshard.Dtype(2, 32, 1)}, (name, "32")),
        ((LAYOUT,), {"dtype": reshard.Dtype(2, 16, 1)}, (name,)),
        ((LAYOUT,), {"strides": dims(1, 16)}, (name, ("stride", "row-major", "contiguous"))),
        ((LAYOUT,), {"strides": dims(17, 1)}, (name, ("stride", "row-major", "contiguous"))),
        ((LAYOUT, INVALID), {"size_bytes": array.nbytes - 2}, (name, str(array.nbytes - 2), str(array.nbytes))),
        ((INVALID, LAYOUT), {"data": None}, (name, "data")),
        ((INVALID,), {"name": None}, ("name",)),
        ((INVALID,), {"shape": None}, ("shape",)),
    ]
    for statuses, changes, words in refusals:
        refused(f"bind with {changes}", lambda: bind(**changes), statuses, *words)
        count += 1
    refused(
        "layout with nothing bound",
        preset.layout,
        (INVALID, NOT_FOUND, LAYOUT, -8),
        name,
        "embedding.word_embeddings.weight",
    )

    bind()  # row-major without strides
    bind(strides=dims(16, 1))
    bind(name=b"module.module." + name.encode())
    bind(name=b"decoder.layers.0.self_attention.rotary_emb.inv_freq", shape=dims(3, 5))
    bind(name=b"extra")
    refused(
        "layout with one bound", preset.layout, (INVALID, NOT_FOUND, LAYOUT, -8), "embedding.word_embeddings.weight"
    )
    rank.preset = preset
    rank.bind()
    tables = preset.layout()
    names = [(b.name.decode(), b.role) for b in tables.buffers[: tables.buffer_count]]
    assert sorted(names) == sorted((p.name, SOURCE) for p in rank.params["source"]), names
    logical = {t.name.decode() for t in tables.tensors[: tables.tensor_count]}
    assert logical == {name for p in rank.params["source"] for name in p.sources}, logical
    short = reshard.LayoutStruct(struct_size=8)
    assert reshard._lib.rs_preset_layout(preset._handle, c.byref(short)) == 0
    assert not short.tensors and not short.tile_count, "more was written than struct_size allows"
    preset.close()
    return count + 4


def check_expert_binds():
    """Parameters of experts: their nominal shapes, the bias in fp32, the names of older releases."""
    target = {**vllm(1), "ranks": [2], "expert_storage": "stacked"}
    s = spec(megatron(2, **{EP: 2, LEGACY: True}), target, model={**DEEPSEEK, "torch_dtype": "float16"})
    count, model = 0, oracle.Model(s["model"])
    experts = "mlp.experts.routed_experts.w13_weight"
    for number, role, name, wrong in (
        (0, "source", "decoder.layers.1.mlp.experts.weight1", {"shape": (c.c_int64 * 8)(4, 16, 24), "ndim": 3}),
        (0, "source", "decoder.layers.1.mlp.router.expert_bias", {"dtype": reshard.Dtype(2, 16, 1)}),
        (2, "target", "model.layers.1." + experts, {"shape": (c.c_int64 * 8)(8, 16, 24)}),
        (2, "target", "model.layers.1.mlp.gate.e_score_correction_bias", {"dtype": reshard.Dtype(2, 64, 1)}),
        (2, "target", "model.layers.1." + experts.replace("routed_experts.", ""), {"dtype": reshard.Dtype(2, 32, 1)}),
    ):
        rank, preset = worlds.Rank(s, number, model), reshard.Preset(s, number)
        by_name = {p.name.replace("routed_experts.", ""): p for p in rank.params[role]}
        param = by_name[name.replace("routed_experts.", "")]
        array = rank.memory[role][param.key]
        right = {"name": name.encode(), "role": worlds.ROLES[role], "dtype": reshard.Dtype(*param.dtype)}

        def bind(**changes):
            struct = bind_struct(param, array, model, **{**right, **changes})
            reshard._check(reshard._lib.rs_preset_bind(preset._handle, c.byref(struct)))

        refused(f"{name} with {wrong}", lambda: bind(**wrong), (LAYOUT,), name.split(".")[-1])
        bind()
        for gone in (
            "model.layers.0." + experts,
            "decoder.layers.0.mlp.router.weight",
            "decoder.layers.1.mlp.experts.linear_fc1.weight0",
        ):
            refused(gone, lambda: bind(name=gone.encode()), (NOT_FOUND,), gone)
        preset.close()
        count += 4
    return count


def check_left_out():
    """Memory that no checkpoint has is left out without a word; what only quantised modules have is refused, with what to do."""
    array, count = np.zeros((2, 3), np.float32), 0
    for target, left_out, wrong in (
        (vllm(1), ("W_UV", "W_UK_T"), ()),
        (vllm(1, mla_derived_weights="copies"), (), ("W_UV", "W_UK_T")),
        (megatron(1), (), ("W_UV", "W_UK_T")),
    ):
        preset = reshard.Preset(spec(target={**target, "ranks": [1]}, model=DEEPSEEK), 1)

        def bind(name, memory=array, dtype=(2, 32, 1)):
            preset.bind(name, memory, TARGET, dtype)

        layer = "model.layers.7.self_attn."
        for name in (
            "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", layer + "attn.k_scale", layer + "attn._v_scale",
            layer + "attn.q_scale", layer + "attn.prob_scale", "model.layers.1.mlp.experts.expert_map", "mlp.experts._expert_map",
            "model.layers.1.mlp.experts.expert_load_view", *(f"{layer}mla_attn.mla_attn.{n}" for n in left_out),
        ):  # fmt: skip
            bind(name)
            count += 1
        for name in (*(f"{layer}mla_attn.mla_attn.{n}" for n in wrong), "model.k_scales", "model.my_inv_freq"):
            refused(name, lambda: bind(name), (NOT_FOUND,), name)
            count += 1
        for name in (
            "weight_scale", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "scales", "g_idx", "input_scale", "w13_weight_scale",
            "w2_weight_scale_inv", "w13_qweight", "w2_scales",
        ):  # fmt: skip
            refused(name, lambda: bind("model.layers.1.mlp." + name), (UNSUPPORTED,), name, "load_weights", "unquantised")
            count += 1
        norm = "model.norm.weight" if "mla_derived_weights" in target or not wrong else "decoder.final_layernorm.weight"
        for dtype in ((10, 8, 1), (12, 8, 1), (0, 8, 1), (1, 8, 1), (0, 4, 1), (17, 4, 1)):
            refused(f"{norm} of {dtype}", lambda: bind(norm, array, dtype), (UNSUPPORTED,), norm, "load_weights")
            count += 1
        preset.close()
    # A user's own list is asked first.
    preset = reshard.Preset(spec(ignore=["*.qweight"]), 0)
    preset.bind("model.layers.0.qweight", array, SOURCE, (2, 32, 1))
    preset.close()
    return count + 1


def check_optional():
    """The last stage's own copy of tied embeddings: a source that may be left out, a target that may not."""
    tied = sized(tie_word_embeddings=True)
    two = megatron(2, **{PP: 2})
    for s, role, needed in ((spec(two, model=tied), "source", False), (spec(target=two, model=tied), "target", True)):
        rank = worlds.Rank(s, 1, oracle.Model(tied))
        preset = reshard.Preset(s, 1)
        for key, array in rank.memory[role].items():
            if key[1] != "output_layer.weight":
                preset.bind(key[1], array, worlds.ROLES[role], rank.model.dtype)
        if needed:
            refused("no output layer", preset.layout, (INVALID, NOT_FOUND, LAYOUT, -8), "output_layer.weight")
        else:
            preset.layout()
        preset.close()
    return 2


def connected(makers):
    """Connects ranks that are made by makers[rank](); the errors by rank."""
    hub, errors, kept = next(worlds.hubs), {}, []

    def work(rank):
        try:
            comm = worlds.LoopbackComm(hub, rank, len(makers))
            kept.append(comm)
            layout = makers[rank]()
            container = reshard.Container(layout, comm, f"rank {rank}", 10000)
            kept.append(container)
            if isinstance(layout, reshard.Preset):
                layout.close()  # the container has what it needs
            container.connect()
        except reshard.Error as error:
            errors[rank] = error

    worlds.on_threads(range(len(makers)), work)
    for handle in kept:
        handle.close()
    return errors


def check_connect():
    s = spec(megatron(2, **{TP: 2}), {**vllm(2, **{V_TP: 2}), "ranks": [1, 2]})
    model = oracle.Model(s["model"])

    def preset(rank, text=s):
        def make():
            made = worlds.Rank(text, rank, model)
            return made.make_preset()

        return make

    def all_say(what, errors, ranks, status, pattern):
        for rank in range(ranks):
            assert rank in errors, f"{what}: rank {rank} connected"
            assert errors[rank].status == status and re.search(pattern, str(errors[rank])), (
                f"{what}: rank {rank}: {errors[rank]}"
            )

    assert not (errors := connected([preset(rank) for rank in range(3)])), errors
    same = dict(reversed(list(s.items())))
    assert not (errors := connected([preset(0), preset(1, same), preset(2)])), errors
    check_written_differently()
    for rank in range(3):
        makers = [preset(r) for r in range(3)]
        makers[rank] = preset(rank, spec(s["source"], s["target"], sized(vocab_size=101)))
        all_say("another spec", connected(makers), 3, MISMATCH, rf"\b{rank}\b")

    def tables():
        layout = reshard.Layout()
        array = np.zeros((MODEL["vocab_size"], 16), np.uint16)
        buffer = layout.buffer("mine", array, SOURCE)
        tensor = layout.tensor("model.embed_tokens.weight", array.shape)
        layout.tile(tensor, buffer, 0, array.shape, (0, 0), array.shape, (16, 1))
        return layout

    errors = connected([tables, preset(1), preset(2)])
    all_say("tables among presets", errors, 3, MISMATCH, r"\b0\b")
    empty = reshard.Layout
    errors = connected([preset(0), preset(1), preset(2), empty])
    all_say("a rank without weights, by tables", errors, 4, MISMATCH, r"\b3\b")

    # The preset of another rank; a communicator that has not all ranks.
    one = spec()
    model = oracle.Model(one["model"])
    errors = connected([preset(1, one)])
    assert 0 in errors and errors[0].status in (INVALID, MISMATCH) and says(str(errors[0]), ["rank", "1", "0"]), errors
    far = spec(target={**HF, "ranks": [3]})
    errors = connected([preset(0, far), preset(1, far)])
    assert len(errors) == 2 and all(says(str(error), ["3"]) for error in errors.values()), errors
    # A rank that has no part has a preset all the same.
    assert not (errors := connected([preset(0, one), preset(1, one)])), errors
    return 10 + len(DEFAULTS)


def check_written_differently():
    for side, written in DEFAULTS:
        ranks, model = len(side["ranks"]), oracle.Model(QWEN)
        makers = []
        for rank in range(ranks):
            text = spec({**side, **written} if rank % 2 else side, model=QWEN)
            makers.append(worlds.Rank(text, rank, model).make_preset)
        try:
            errors = connected(makers)
        except Exception as error:
            errors = error
        if errors:
            failures.append(f"{json.dumps(side)} with {json.dumps(written)} on some ranks does not connect: {errors}")


def main():
    counts = {}
    for part in (
        check_specs,
        check_accepted,
        check_ignore,
        check_binds,
        check_expert_binds,
        check_left_out,
        check_optional,
        check_connect,
    ):
        try:
            counts[part.__name__.removeprefix("check_")] = part()
        except Exception as error:
            failures.append(f"{part.__name__}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(f"{len(failures)} failures\n" + "\n".join(failures))
    print("refusals: " + ", ".join(f"{count} {part}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
