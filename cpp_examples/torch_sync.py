#!/usr/bin/env python3
"""The weights of a decoder layer, from two PyTorch trainers into an engine, on a CPU or a GPU: torch_sync.py [--device cpu | cuda]

The trainers hold the layer as Megatron cuts it with tensor parallel 2, the engine holds it as vLLM does, whole. Each describes its own
tensors by tables; torch's views say where a box lies. After each sync every byte of the engine is compared with what torch's own cat, view
and reshape make of the shards. The library is $RESHARD_LIBRARY, else libreshard.so.1 where the loader finds it.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import reshard_torch
import torch
from reshard import SOURCE, TARGET

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 16, 4, 32, 512
TP = 2
Q_ROWS = HEADS // KV_HEADS * HEAD_DIM  # of one group: the query heads that share a key and a value head
ROWS = {"q": Q_ROWS, "k": HEAD_DIM, "v": HEAD_DIM}  # of one group, in Megatron's order
GROUP = sum(ROWS.values())


def hugging_face(part):
    """A tensor's name in the checkpoint: what trainers and engine have in common."""
    folder = {"q": "self_attn.", "k": "self_attn.", "v": "self_attn.", "o": "self_attn."}.get(part, "mlp.")
    return f"model.layers.0.{folder}{part}_proj.weight"


class Trainer:
    """Tensor-parallel rank `tp`: its shards as parameters, and where the boxes of the checkpoint's tensors lie in them."""

    def __init__(self, tp, device):
        torch.manual_seed(tp)

        def shard(*shape):
            return torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16, device=device))

        self.norm = torch.nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16, device=device))  # the same on all
        self.qkv = shard(KV_HEADS // TP * GROUP, HIDDEN)  # group by group: its query heads, its key head, its value head
        self.proj = shard(HIDDEN, HEADS * HEAD_DIM // TP)  # a cut of the columns
        self.fc1 = shard(2 * FFN // TP, HIDDEN)  # this rank's rows of gate, then of up
        self.fc2 = shard(HIDDEN, FFN // TP)
        self.layout = reshard_torch.Layout()
        self.describe(tp)

    def describe(self, tp):
        layout = self.layout
        layout.whole("model.layers.0.input_layernorm.weight", "linear_qkv.layer_norm_weight", self.norm, SOURCE)

        buffer, first_group = layout.buffer("linear_qkv.weight", self.qkv, SOURCE), tp * KV_HEADS // TP
        pieces = self.qkv.view(-1, GROUP, HIDDEN).split(list(ROWS.values()), dim=1)
        for (part, rows), piece in zip(ROWS.items(), pieces):
            tensor = layout.tensor(hugging_face(part), (KV_HEADS * rows, HIDDEN))
            layout.part(tensor, (KV_HEADS, rows, HIDDEN), (first_group, 0, 0), buffer, piece)

        buffer = layout.buffer("linear_fc1.weight", self.fc1, SOURCE)
        for part, piece in zip(("gate", "up"), self.fc1.chunk(2)):
            tensor = layout.tensor(hugging_face(part), (FFN, HIDDEN))
            layout.part(tensor, (FFN, HIDDEN), (tp * FFN // TP, 0), buffer, piece)

        for part, name, shard in (("o", "linear_proj.weight", self.proj), ("down", "linear_fc2.weight", self.fc2)):
            rows, columns = shard.shape
            tensor = layout.tensor(hugging_face(part), (rows, columns * TP))
            layout.part(tensor, (rows, columns * TP), (0, tp * columns), layout.buffer(name, shard, SOURCE), shard)

    def train(self):
        """A step of SGD, in place, as optimizers do it: the parameters stay where they are."""
        shards = (self.norm, self.qkv, self.proj, self.fc1, self.fc2)
        sum(shard.square().sum() for shard in shards).backward()
        with torch.no_grad():
            for shard in shards:
                shard -= 0.1 * shard.grad
                shard.grad = None


class Engine:
    """Whole tensors, fused as vLLM does: all query heads, all key heads, all value heads; all of gate, all of up."""

    def __init__(self, device):
        def empty(*shape):
            return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=device)

        self.params = {
            "input_layernorm.weight": empty(HIDDEN),
            "self_attn.qkv_proj.weight": empty(KV_HEADS * GROUP, HIDDEN),
            "self_attn.o_proj.weight": empty(HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_up_proj.weight": empty(2 * FFN, HIDDEN),
            "mlp.down_proj.weight": empty(HIDDEN, FFN),
        }
        self.layout = reshard_torch.Layout()
        for name, param in self.params.items():
            if "qkv" in name:
                self.describe_rows(name, param, {part: KV_HEADS * rows for part, rows in ROWS.items()})
            elif "gate_up" in name:
                self.describe_rows(name, param, {"gate": FFN, "up": FFN})
            else:
                self.layout.whole(f"model.layers.0.{name}", name, param, TARGET)

    def describe_rows(self, name, param, rows_of):
        buffer = self.layout.buffer(name, param, TARGET)
        for (part, rows), piece in zip(rows_of.items(), param.split(list(rows_of.values()))):
            tensor = self.layout.tensor(hugging_face(part), (rows, HIDDEN))
            self.layout.part(tensor, (rows, HIDDEN), (0, 0), buffer, piece)


def expected(trainers):
    """The engine's parameters, of the trainers' shards, by torch alone."""
    groups = torch.cat([t.qkv.view(-1, GROUP, HIDDEN) for t in trainers])
    heads = [piece.reshape(-1, HIDDEN) for piece in groups.split(list(ROWS.values()), dim=1)]
    gates, ups = zip(*(t.fc1.chunk(2) for t in trainers))
    return {
        "input_layernorm.weight": trainers[0].norm,
        "self_attn.qkv_proj.weight": torch.cat(heads),
        "self_attn.o_proj.weight": torch.cat([t.proj for t in trainers], dim=1),
        "mlp.gate_up_proj.weight": torch.cat([*gates, *ups]),
        "mlp.down_proj.weight": torch.cat([t.fc2 for t in trainers], dim=1),
    }


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int16)


def main():
    parser = argparse.ArgumentParser(description="Weights from two PyTorch trainers into an engine.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("PyTorch finds no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())

    trainers, engine = [Trainer(tp, device) for tp in range(TP)], Engine(device)
    layouts = [trainer.layout for trainer in trainers] + [engine.layout]
    containers = []
    for rank, layout in enumerate(layouts):  # here all ranks are threads of this process; LocalComm connects processes
        comm = reshard_torch.Loopback(1, rank, len(layouts))
        containers.append(reshard_torch.Container(layout, comm, f"rank {rank}"))
        comm.close()  # the container holds a reference of its own

    with ThreadPoolExecutor(len(layouts)) as ranks:

        def everywhere(call):
            list(ranks.map(call, containers))

        everywhere(lambda container: container.connect())  # plans, once
        # What the engine computes with: its own memory, as the library knows it. Taken once, it shows every later version.
        weights = {name: containers[-1].tensor(name) for name in engine.params}
        before = None
        for version in 1, 2:
            everywhere(lambda container: container.sync(version))
            right = expected(trainers)
            for name, weight in weights.items():
                assert weight.data_ptr() == engine.params[name].data_ptr(), f"{name} was copied"
                assert torch.equal(bits(weight), bits(right[name])), f"{name} differs at version {version}"
                assert before is None or not torch.equal(bits(weight), before[name]), f"{name} did not change"
            before = {name: bits(weight).clone() for name, weight in weights.items()}
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            print(f"version {version}: {total:,} bytes on {device} are those of the trainers")
            for trainer in trainers:
                trainer.train()

    for container in containers:
        container.close()


if __name__ == "__main__":
    main()
