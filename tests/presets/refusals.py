"""What presets must refuse, and what the error must name. Nothing is approximated: what a framework forbids is an error here."""

import ctypes as c
import json
import re

import numpy as np
import oracle
import worlds
from worlds import SOURCE, TARGET, reshard

INVALID, UNSUPPORTED, NOT_FOUND, LAYOUT, MISMATCH = -1, -3, -4, -20, -22
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
PIPELINE, LIST, NOOPS = "pipeline_model_parallel_layout", "num_layer_list", "noop_layers"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
V_TP, V_PP, V_LIST = "tensor_parallel_size", "pipeline_parallel_size", "VLLM_PP_LAYER_PARTITION"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2,
    "intermediate_size": 24, "vocab_size": 100, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOLLM2 = {
    **MODEL, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
HF = {"framework": "hf", "ranks": [0]}


def spec(source=HF, target=HF, model=MODEL, **more):
    return {"model": model, "source": source, "target": target, **more}


def megatron(ranks, **setting):
    return {"framework": "megatron", "ranks": list(range(ranks)), **setting}


def vllm(ranks, **setting):
    return {"framework": "vllm", "ranks": list(range(ranks)), **setting}


def sized(**sizes):
    return {**MODEL, **sizes}


def without(member):
    return {key: value for key, value in MODEL.items() if key != member}


M, V = megatron, vllm
# A spec, and what the error names: every word, or one of the words of a tuple.
SPECS = [
    (spec(V(9, **{V_TP: 9}), model=SMOLLM2), "9", ("1536", "49152", "intermediate_size", "vocab_size")),
    (spec(V(2, **{V_TP: 2}), model=sized(num_attention_heads=6, num_key_value_heads=3)), "num_key_value_heads"),
    (spec(V(3, **{V_TP: 3}), model=sized(num_key_value_heads=1)), "num_attention_heads"),
    (spec(V(3, **{V_TP: 3}), model=sized(num_attention_heads=6, num_key_value_heads=3)), ("vocab_size", "vocab_padding_size")),
    (spec(V(2, **{V_TP: 2}), model=sized(intermediate_size=25)), "intermediate_size"),
    (spec(V(2, **{V_PP: 2, V_LIST: "1,2"})), V_LIST),
    (spec(V(2, **{V_PP: 2, V_LIST: "1,1,2"})), V_LIST),
    (spec(V(3, **{V_TP: 2})), "ranks"),
    (spec(V(3, **{V_TP: 1, "replicas": 2})), ("ranks", "replicas")),
    (spec(V(2, **{V_TP: 2, TP: 2})), TP),
    (spec(V(1, enable_expert_parallel=True)), "enable_expert_parallel"),

    (spec(M(3, **{TP: 3}), model=sized(num_key_value_heads=1)), "num_attention_heads"),
    (spec(M(4, **{TP: 4}), model=sized(intermediate_size=22)), "intermediate_size"),
    (spec(M(6, **{TP: 6}), model=sized(num_attention_heads=12)), ("num_key_value_heads", "num_query_groups")),
    (spec(M(3, **{TP: 3}), model=sized(num_attention_heads=6, num_key_value_heads=2)), ("num_key_value_heads", "num_query_groups")),
    (spec(M(18, **{TP: 18}), model=sized(num_attention_heads=36, num_key_value_heads=6, head_dim=4, intermediate_size=36)), "linear_qkv"),
    (spec(M(3, **{PP: 3})), (PP, "num_hidden_layers")),
    (spec(M(2, **{PP: 2, LIST: "1,2"})), LIST),
    (spec(M(2, **{PP: 2, LIST: "1,1,2"})), LIST),
    (spec(M(2, **{PP: 2, VPP: 2, LIST: "2,2"})), (LIST, VPP)),
    (spec(M(2, **{PP: 2, LIST: "1,x"})), LIST),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ettt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "tt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|tt"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "EEtt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|tt|tL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Ext|tttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "E(tt|ttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et*|tttL"})), PIPELINE),
    (spec(M(2, **{PP: 2, PIPELINE: "Et|t|t|tL", VPP: 3})), (PIPELINE, VPP)),
    (spec(M(2, **{PP: 2, PIPELINE: "Ett|ttL", FIRST: 2})), (PIPELINE, FIRST)),
    (spec(M(2, **{PP: 2, NOOPS: "9,2"})), NOOPS),
    (spec(M(2, **{PP: 2, NOOPS: "-1,2"})), NOOPS),
    (spec(M(2, **{PP: 2, NOOPS: "1,1"})), NOOPS),
    (spec(M(2, **{PP: 2, VPP: 4})), VPP),
    (spec(M(2, **{PP: 2, VPP: 3})), VPP),
    (spec(M(1, **{VPP: 2})), VPP),
    (spec(M(2, **{PP: 2, FIRST: 5})), FIRST),
    (spec(M(2, **{PP: 2, FIRST: 1, LAST: 2})), (FIRST, LAST)),
    (spec(M(2, **{PP: 2, FIRST: 1, "account_for_embedding_in_pipeline_split": True})), (FIRST, "account_for_embedding_in_pipeline_split")),
    (spec(M(2, **{PP: 2, "account_for_loss_in_pipeline_split": True})), ("account_for_loss_in_pipeline_split", PP)),
    (spec(M(3, **{TP: 2})), "ranks"),
    (spec(M(4, **{TP: 2, "data_parallel_size": 3})), ("data_parallel_size", "ranks")),
    (spec(M(2, **{"context_parallel_size": 4})), ("context_parallel_size", "ranks")),
    (spec(M(1, padded_vocab_size=99)), "padded_vocab_size"),
    (spec(M(2, **{TP: 2, "padded_vocab_size": 101})), "padded_vocab_size"),
    (spec(M(1, make_vocab_size_divisible_by=0)), "make_vocab_size_divisible_by"),
    (spec(M(1, transformer_impl="inference")), "transformer_impl"),
    (spec(M(2, **{"expert_model_parallel_size": 2})), "expert_model_parallel_size"),
    (spec(M(2, **{V_TP: 2})), V_TP),
    (spec(M(2, **{TP: 0})), TP),
    (spec(M(2, **{TP: -2})), TP),
    (spec(M(2, **{TP: 1.5})), TP),
    (spec(M(2, **{TP: "two"})), TP),

    (spec({**HF, "ranks": [0, 1, 1]}), "ranks", "1"),
    (spec({**HF, "ranks": "0-2,2"}), "ranks", "2"),
    (spec({**HF, "ranks": "2-1"}), "ranks"),
    (spec({**HF, "ranks": "a"}), "ranks"),
    (spec({**HF, "ranks": ""}), "ranks"),
    (spec({**HF, "ranks": []}), "ranks"),
    (spec({**HF, "ranks": [-1]}), "ranks"),
    (spec({"framework": "hf"}), "ranks"),
    (spec({**HF, TP: 1}), TP),
    (spec({"ranks": [0]}), "framework"),
    (spec({**HF, "framework": "deepspeed"}), "deepspeed"),
    (spec(sauce=1), "sauce"),
    ({"model": MODEL, "target": HF}, "source"),
    ({"source": HF, "target": HF}, "model"),
    (spec(ranks_per_host=0), "ranks_per_host"),
    (spec(ignore="all"), "ignore"),

    (spec(model=without("hidden_size")), "hidden_size"),
    (spec(model=without("architectures")), "architectures"),
    (spec(model=without("vocab_size")), "vocab_size"),
    (spec(model=sized(hidden_size="16")), "hidden_size"),
    (spec(model=sized(num_hidden_layers=0)), "num_hidden_layers"),
    (spec(model=sized(num_key_value_heads=3)), "num_key_value_heads"),
    (spec(model=sized(torch_dtype="int7")), "int7"),
]  # fmt: skip
NOT_BUILT = [
    (spec(model=sized(architectures=["BertModel"])), "BertModel"),
    (spec(model=sized(attention_bias=True)), "attention_bias"),
    (spec(model=sized(mlp_bias=True)), "mlp_bias"),
    (spec(model=sized(quantization_config={"quant_method": "fp8"})), "quantization_config"),
    (spec({**HF, "dtype": "float32"}), ("dtype", "cast")),
    (spec(M(1, params_dtype="float32"), V(1)), ("dtype", "cast")),
]


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
    special["model"] = {k: model.get(k) for k in MODEL.keys() | model.keys() if model.get(k) != MODEL.get(k)}
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
    for text in (b"", b"{", b"[]", b"null", b"{} {}", b"\xff", b'{"model": 1, "source": 2, "target": 3}'):
        refused(text, lambda: create(text, 0), (INVALID,))
        count += 1
    refused("no spec", lambda: create(None, 0), (INVALID,))
    refused("rank -1", lambda: create(json.dumps(spec()).encode(), -1), (INVALID,), "rank")
    status = reshard._lib.rs_preset_create(json.dumps(spec()).encode(), 0, None)
    assert status == INVALID, status
    ignored = sized(attention_bias=False, mlp_bias=False, attention_dropout=0.0, my_own_member=[1])
    create(json.dumps(spec(model=ignored)).encode(), 0)
    return count + 3


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
    return 10


def main():
    counts = {}
    for part in (check_specs, check_binds, check_optional, check_connect):
        try:
            counts[part.__name__.removeprefix("check_")] = part()
        except Exception as error:
            failures.append(f"{part.__name__}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(f"{len(failures)} failures\n" + "\n".join(failures))
    print("refusals: " + ", ".join(f"{count} {part}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
