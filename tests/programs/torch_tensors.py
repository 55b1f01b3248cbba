"""PyTorch's tensors through cpp_examples/reshard_torch.py, on a CPU: torch_tensors.py [WORD ...]

All tests, or those whose name holds a word. RESHARD_LIBRARY is the library, as for reshard.py. PyTorch 1.13 or newer.
"""

import ctypes as c
import gc
import itertools
import os
import subprocess
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../cpp_examples")
sys.path.insert(0, EXAMPLES)

import reshard  # noqa: E402
import reshard_torch  # noqa: E402
import torch  # noqa: E402
from reshard import PADDED, SOURCE, TARGET  # noqa: E402

hubs = itertools.count(1)


def containers(*layouts):
    """One for each rank, not yet connected."""
    hub, made = next(hubs), []
    for rank, layout in enumerate(layouts):
        comm = reshard_torch.Loopback(hub, rank, len(layouts))
        made.append(reshard_torch.Container(layout, comm, f"rank {rank}", timeout_ms=20000))
        comm.close()
    return made


def together(ranks, call):
    """call(container) of all ranks at once; the first exception, the others done."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def synced(*layouts):
    ranks = containers(*layouts)
    together(ranks, lambda rank: rank.connect())
    together(ranks, lambda rank: rank.sync(1))
    return ranks


def close(ranks):
    for rank in ranks:
        rank.close()


def whole(tensor, role):
    """A layout of one parameter that is the tensor `w`."""
    layout = reshard_torch.Layout()
    layout.whole("w", "trained.w" if role == SOURCE else "served.w", tensor, role)
    return layout


def moved(source, target):
    """`source` goes into `target`; the container of the latter."""
    source_rank, target_rank = synced(whole(source, SOURCE), whole(target, TARGET))
    source_rank.close()
    return target_rank


def fails(kind, words, call):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no {kind.__name__} with {words}")


def numbers(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def test_every_dtype_arrives():
    for dtype in reshard_torch.DTYPES:
        source = torch.arange(100, 160).reshape(6, 10).to(dtype)
        target = torch.zeros(6, 10, dtype=dtype)
        moved(source, target).close()
        assert torch.equal(source, target), dtype
        row = reshard_torch.row("w", source)
        assert row["dtype"].bits == 8 * source.element_size()
        if dtype != torch.bool:  # which PyTorch 1.13 cannot name to others
            capsule = torch.utils.dlpack.to_dlpack(source)
            managed = c.cast(capsule_pointer(capsule), c.POINTER(reshard_torch.DLManagedTensor)).contents
            theirs, ours = managed.tensor.dtype, row["dtype"]
            assert (theirs.code, theirs.bits, theirs.lanes) == (ours.code, ours.bits, ours.lanes), dtype


def capsule_pointer(capsule):
    get = c.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
    return get(capsule, b"dltensor")


def test_floats_are_cast():
    source, target = torch.randn(16, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    moved(source, target).close()
    assert torch.equal(target, source.to(torch.bfloat16))


def test_a_dtype_that_is_none_of_a_weight():
    refused = [torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex128)]
    if hasattr(torch, "float8_e4m3fn"):
        refused += [torch.zeros(3, dtype=torch.float8_e4m3fn), torch.zeros(3, dtype=torch.float8_e5m2)]
    for tensor in refused:
        fails(TypeError, ["served.w: ", str(tensor.dtype), "torch.bfloat16"], lambda: whole(tensor, TARGET))


def test_dtypes_that_do_not_become_each_other():
    ranks = containers(whole(numbers(4, dtype=torch.int8), SOURCE), whole(torch.zeros(4), TARGET))
    words = ["'w'", "(code 0, bits 8)", "(code 2, bits 32)"]
    together(ranks, lambda rank: fails(reshard.Error, words, rank.connect))
    close(ranks)


def test_memory_that_is_not_strided_or_elsewhere():
    fails(TypeError, ["served.w: ", "torch.sparse_coo"], lambda: whole(torch.eye(3).to_sparse(), TARGET))
    fails(TypeError, ["served.w: ", "'meta'"], lambda: whole(torch.zeros(3, device="meta"), TARGET))


def test_strides_that_do_not_nest():
    for tensor in torch.zeros(1, 4).expand(3, 4), torch.zeros(9).as_strided((3, 4), (2, 1)):
        fails(reshard.Error, ["RS_ERR_", "trained.w", "stride"], lambda: containers(whole(tensor, SOURCE)))


def test_an_empty_tensor():
    for tensor in torch.zeros(3, 0), torch.zeros(0), torch.zeros(9).as_strided((0,), (5,)):
        fails(reshard.Error, ["RS_ERR_", "'w'", "0"], lambda: containers(whole(tensor, SOURCE)))


def test_a_preset_wants_dense_memory():
    """The table takes what a world spec refuses."""
    model = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 6, "vocab_size": 8, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    spec = {"model": model, "source": {"framework": "hf", "ranks": "0"}, "target": {"framework": "hf", "ranks": "1"}}
    ranks, params = [], []
    for rank, role in enumerate((SOURCE, TARGET)):
        preset = reshard_torch.Preset(spec, rank)
        name = "model.layers.0.mlp.down_proj.weight"
        fails(reshard.Error, [name, "stride"], lambda: preset.bind(name, torch.zeros(6, 4, dtype=torch.bfloat16).t(), role))
        fails(reshard.Error, [name, "dtype"], lambda: preset.bind(name, torch.zeros(4, 6, dtype=torch.float32), role))
        made = {p["name"]: torch.zeros(p["shape"], dtype=torch.bfloat16) for p in preset.describe(reshard.DESCRIBE_LAYOUT)["params"]}
        for name, tensor in made.items():
            preset.bind(name, tensor.normal_() if role == SOURCE else tensor, role)
        ranks.append(preset)
        params.append(made)
    ranks = synced(*ranks)
    assert params[0].keys() == params[1].keys() and len(params[0]) > 9
    for name, tensor in params[0].items():
        assert torch.equal(tensor, params[1][name]), name
        assert ranks[1].tensor(name).data_ptr() == params[1][name].data_ptr()
    close(ranks)


def test_no_axis():
    source, target = torch.tensor(2.5), torch.zeros(())
    container = moved(source, target)
    lent = container.tensor("served.w")
    assert (lent.shape, lent.item(), lent.data_ptr()) == ((), 2.5, target.data_ptr())
    container.close()


def test_views_are_written_where_they_lie():
    source = numbers(6, 4)
    transposed, wide, every_other = torch.zeros(4, 6).t(), torch.full((6, 7), -1.0), torch.full((6, 8), -1.0)
    for view in transposed, wide[:, 2:6], every_other[:, ::2]:
        container = moved(source, view)
        assert torch.equal(view, source)
        lent = container.tensor("served.w")
        assert (lent.data_ptr(), lent.stride()) == (view.data_ptr(), view.stride())
        assert torch.equal(lent, source)
        container.close()
    for rest in wide[:, :2], wide[:, 6:], every_other[:, 1::2]:
        assert torch.equal(rest, torch.full_like(rest, -1)), "a gap was written"


def test_views_are_read_where_they_lie():
    base = numbers(5, 9)
    for view in base.t(), base[1:4, 2:7], base[:, 1::3]:
        target = torch.zeros(view.shape)
        moved(view, target).close()
        assert torch.equal(target, view)


def test_a_parameter_that_wants_a_gradient():
    source = torch.nn.Parameter(torch.randn(4, 4))
    target = torch.nn.Parameter(torch.zeros(4, 4))
    container = moved(source, target)
    assert torch.equal(target, source) and target.is_leaf and target.requires_grad
    lent = container.tensor("served.w")
    assert not lent.requires_grad and lent.data_ptr() == target.data_ptr()
    container.close()


def test_parts_by_views():
    """A fused parameter on the target's side, interleaved by groups, with padding; from two whole tensors."""
    a, b = numbers(6, 5), -numbers(3, 5)
    fused = torch.full((11, 5), 7.0)
    groups = fused[:9].view(3, 3, 5)
    source, target = reshard_torch.Layout(), reshard_torch.Layout()
    source.whole("a", "a", a, SOURCE)
    source.whole("b", "b", b, SOURCE)
    buffer = target.buffer("fused", fused, TARGET, PADDED)
    target.part(target.tensor("a", (6, 5)), (3, 2, 5), (0, 0, 0), buffer, groups[:, :2])
    target.part(target.tensor("b", (3, 5)), (3, 1, 5), (0, 0, 0), buffer, groups[:, 2:])
    close(synced(source, target))
    assert torch.equal(fused[:9].view(3, 3, 5), torch.cat([a.view(3, 2, 5), b.view(3, 1, 5)], dim=1))
    assert torch.equal(fused[9:], torch.full((2, 5), 7.0))


def test_a_piece_of_other_memory():
    layout, base = reshard_torch.Layout(), numbers(8, 4)
    buffer = layout.buffer("middle", base[2:4], SOURCE)
    tensor = layout.tensor("w", (8, 4))
    for piece in base[:2], base[4:], numbers(2, 4), base[2:4].view(torch.int32):
        fails(ValueError, ["middle: ", "no view"], lambda: layout.part(tensor, (8, 4), (0, 0), buffer, piece))
    layout.part(tensor, (8, 4), (2, 0), buffer, base[3:6])  # begins in it, ends beyond
    fails(reshard.Error, ["RS_ERR_LAYOUT", "middle"], lambda: containers(layout))


def test_a_lent_tensor_is_the_parameter():
    source, target = numbers(4, 6), torch.zeros(4, 6)
    ranks = synced(whole(source, SOURCE), whole(target, TARGET))
    lent, address = ranks[1].tensor("served.w"), target.data_ptr()
    assert (lent.data_ptr(), lent.dtype, lent.shape, lent.stride()) == (address, target.dtype, target.shape, target.stride())
    lent[1, 2] = 100
    assert target[1, 2] == 100
    target[3, 3] = 200
    assert lent[3, 3] == 200
    source *= 2
    together(ranks, lambda rank: rank.sync(2))
    assert torch.equal(lent, source) and target.data_ptr() == address
    trained = ranks[0].tensor("trained.w")  # sources too
    assert trained.data_ptr() == source.data_ptr()
    fails(reshard.Error, ["RS_ERR_NOT_FOUND", "'nobody'"], lambda: ranks[1].tensor("nobody"))
    close(ranks)


def test_memory_lives_as_long_as_what_was_lent():
    source, target = numbers(1000, 1000), torch.zeros(1000, 1000)
    container, gone = moved(source, target), weakref.ref(target)
    lent = container.tensor("served.w")
    rows = lent[5:10]
    container.close()
    del container, target, lent
    gc.collect()
    assert gone() is not None, "the memory's owner is gone"
    noise = [torch.full((1000, 1000), -1.0) for _ in range(4)]  # would take freed memory
    assert torch.equal(rows, source[5:10])
    del rows, noise
    gc.collect()
    assert gone() is None, "the memory's owner stays for ever"


def test_a_container_keeps_its_tensors():
    target = torch.zeros(4)
    gone = weakref.ref(target)
    container = moved(numbers(4), target)
    del target
    gc.collect()
    assert torch.equal(container.tensor("served.w"), numbers(4))
    container.close()
    del container
    gc.collect()
    assert gone() is None


def test_everything_is_given_back_once():
    complaints, hook = [], sys.unraisablehook
    sys.unraisablehook = complaints.append  # a deleter that is called twice finds nothing
    try:
        assert not reshard_torch._lent
        container = moved(numbers(4), torch.zeros(4))
        lent = [container.tensor("served.w") for _ in range(10)]
        assert len(reshard_torch._lent) == 10
        del lent[:3]
        gc.collect()
        assert len(reshard_torch._lent) == 7
        other = threading.Thread(target=lent.clear)
        other.start()
        other.join()
        gc.collect()
        assert not reshard_torch._lent
        container.close()
        assert not complaints, complaints
        reshard_torch._give_back(0)
        assert len(complaints) == 1, "a second call would not be seen"
    finally:
        sys.unraisablehook = hook


def test_what_torch_does_not_take_is_given_back():
    container = moved(numbers(4), torch.zeros(4))
    param, owner = container.param("served.w"), object()
    param.device_type = 77
    fails(Exception, ["77"], lambda: reshard_torch.lend(param, owner))
    assert not reshard_torch._lent
    container.close()


LATE = """
import builtins, gc, sys
sys.path.insert(0, {folder!r})
import torch_tensors as tests
import torch
container = tests.moved(tests.numbers(1000, 1000), torch.zeros(1000, 1000))
builtins.late = container.tensor("served.w")  # outlives the modules that lent it, and all others
builtins.later = late[:]
container.close()
del container, tests, sys.modules["torch_tensors"], sys.modules["reshard_torch"], sys.modules["reshard"]
gc.collect()
noise = [torch.full((1000, 1000), -1.0) for _ in range(4)]  # would take freed memory
assert torch.equal(late, torch.arange(1000000.0).reshape(1000, 1000))
"""


def test_a_tensor_at_the_interpreters_end():
    command = [sys.executable, "-B", "-c", LATE.format(folder=os.path.dirname(os.path.abspath(__file__)))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Exception" not in ended.stderr, ended


def test_device_codes():
    """Without a GPU: what is asked of a tensor is answered as one of a GPU would."""

    class Pinned(torch.Tensor):
        def is_pinned(self):
            return True

    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: 3
    try:
        assert reshard_torch.device(torch.zeros(2)) == (1, 0)
        assert reshard_torch.device(torch.zeros(2).as_subclass(Pinned)) == (3, 3)
        assert reshard_torch.device(types.SimpleNamespace(device=torch.device("cuda", 1))) == (2, 1)
        row = reshard_torch.row("w", torch.zeros(2).as_subclass(Pinned))
        assert (row["device_type"], row["device_id"]) == (3, 3)
    finally:
        torch.cuda.current_device = current
    container = moved(numbers(4), torch.zeros(4))
    param = container.param("served.w")
    param.device_type = reshard_torch.CUDA_HOST  # to torch such memory is a CPU's
    assert torch.equal(reshard_torch.lend(param, None), numbers(4))
    container.close()


def test_a_gpus_stream_and_an_end_that_comes_later():
    """Without a GPU: the stream is torch's current one of the tensors' GPU, and RS_IN_PROGRESS is waited for."""
    container = moved(numbers(4), torch.zeros(4))
    seen, answers = [], [reshard.IN_PROGRESS, reshard.IN_PROGRESS, 0]

    def begin(handle, request):
        seen.append((request._obj.stream, request._obj.version, request._obj.struct_size))
        return reshard.IN_PROGRESS

    current, library = torch.cuda.current_stream, reshard._lib
    torch.cuda.current_stream = lambda gpu: types.SimpleNamespace(cuda_stream={1: 0xABC0}[gpu.index])
    reshard._lib = types.SimpleNamespace(rs_sync_weights=begin, rs_container_poll=lambda handle: answers.pop(0))
    container._gpu = torch.device("cuda", 1)
    try:
        container.sync(9)
    finally:
        torch.cuda.current_stream, reshard._lib = current, library
    assert (seen, answers) == ([(0xABC0, 9, c.sizeof(reshard.SyncStruct))], [])
    container.close()


def test_a_sync_that_fails():
    ranks = containers(whole(numbers(4), SOURCE), whole(torch.zeros(4), TARGET))
    together(ranks, lambda rank: rank.connect())
    versions = dict(zip(ranks, (8, 9)))
    together(ranks, lambda rank: fails(reshard.Error, ["MISMATCH", "version 8", "version 9"], lambda: rank.sync(versions[rank])))
    together(ranks, lambda rank: rank.sync(10))
    close(ranks)


def test_only_some_tensors():
    source, target = reshard_torch.Layout(), reshard_torch.Layout()
    for layout, role in (source, SOURCE), (target, TARGET):
        for name in "ab":
            layout.whole(name, name, torch.full((3,), 5.0 if role == SOURCE else 0.0), role)
    ranks = containers(source, target)
    together(ranks, lambda rank: rank.connect())
    together(ranks, lambda rank: rank.sync(1, only=["b"]))
    assert (ranks[1].tensor("a")[0], ranks[1].tensor("b")[0]) == (0, 5)
    close(ranks)


def test_the_example():
    command = [sys.executable, "-B", os.path.join(EXAMPLES, "torch_sync.py")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    total = "1,442,304 bytes on cpu are those of the trainers"
    assert said.stdout == f"version 1: {total}\nversion 2: {total}\n", said.stdout


def main():
    words = sys.argv[1:]
    chosen = [name for name in globals() if name.startswith("test_") and (not words or any(word in name for word in words))]
    for name in chosen:
        print(name, flush=True)
        globals()[name]()
    print(f"{len(chosen)} tests with PyTorch {torch.__version__}")
    sys.exit(not chosen)


if __name__ == "__main__":
    main()
