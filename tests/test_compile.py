"""``torch.compile`` of the model, and ``torch.export`` of its halves."""

import shutil
import sysconfig
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from torch.export import Dim, export

from tests.conftest import cut, difference, make_family, padded

# Batch and lengths: some equal each other, and the heads, and the batch.
SHAPES = [(2, 9, 5), (3, 40, 12), (4, 4, 4), (2, 7, 140), (5, 140, 5)]
b, s, k = Dim("b"), Dim("s"), Dim("k")


def small_t5(depth=1):
    """A T5 that compiles in seconds, with norms and biases that show."""
    sizes = dict(num_layers=depth, num_decoder_layers=depth)
    return make_family("t5-v1_1", **sizes)[0].requires_grad_(False)


@pytest.fixture(autouse=True)
def compile_anew():
    """Forget what was compiled before, and take floats as they are.

    Otherwise ``dynamic=True`` makes a variable of every float, finds out that
    it is none, and begins again: the same graph in twice the time.

    What inductor keeps on disk, it finds by the graph and the settings, but
    not by the processor's vector instructions (torch 2.13): after a run with
    AVX-512, one with ``ATEN_CPU_CAPABILITY=avx2`` leaves half of the numbers
    uninitialised. So we add the instructions to the key.
    """
    torch.compiler.reset()
    instructions = torch.backends.cpu.get_cpu_capability()
    with (
        torch._dynamo.config.patch(specialize_float=True),
        torch.compiler.config.patch(cache_key_tag=instructions),
    ):
        yield
    torch.compiler.reset()


# --- torch.compile --------------------------------------------------------


PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    not (shutil.which(inductor.cpp.cxx[1]) and PYTHON_H.exists()),
    reason="inductor needs a compiler of C++ and Python's headers",
)
BACKENDS = [
    ("aot_eager", 1e-6),
    pytest.param("inductor", 1e-5, marks=needs_compiler),  # the default
]


@pytest.mark.rounding
@pytest.mark.parametrize("backend, bound", BACKENDS)
def test_one_graph_serves_every_length(backend, bound):
    model = small_t5()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for shape in SHAPES:
        batch = padded(*shape)
        assert difference(compiled(*batch), model(*batch)) <= bound, shape
    assert counter.frame_count == 1


# --- torch.export ---------------------------------------------------------


class Encode(nn.Module):
    """The half of a T5 that reads, as a module of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, src, mask):
        return self.model.encode(src, mask)


class Step(nn.Module):
    """One step of writing: tensors in, tensors out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token, memory, mask, kept):
        cache = self.model.decoder.new_cache(memory, mask)
        for block, tensors in zip(cache.blocks, kept):
            block.target, block.source = tensors
        if kept:
            cache.length = cache.blocks[0].target[0].shape[2]
        logits = self.model.decode(token, cache=cache)
        return logits, [(block.target, block.source) for block in cache.blocks]


def exported(module, arguments, shapes):
    """A module as a program that was stored in a file and read back."""
    file = BytesIO()
    torch.export.save(export(module, arguments, dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()


def test_the_encoder_can_be_exported():
    model = small_t5()
    src, _, mask, _ = padded(3, 9, 1)
    encode = exported(Encode(model), (src, mask), [{0: b, 1: s}] * 2)
    for shape in [(3, 9), (4, 4), (1, 1), (2, 140), (7, 1)]:
        src, _, mask, _ = padded(*shape, 1)
        assert difference(encode(src, mask), model.encode(src, mask)) <= 1e-6, shape


def test_a_step_of_the_decoder_can_be_exported():
    """A loop around the program writes what ``generate`` writes.

    In float64, since the tokens that they write are compared.
    """
    model, step = small_t5(depth=2).double(), None
    plain = Step(model)
    for batch, s_len, steps in [(3, 9, 4), (2, 40, 132), (4, 4, 9)]:
        src, _, mask, _ = padded(batch, s_len, 1)
        memory = model.encode(src, mask)
        logits, kept = plain(torch.zeros_like(src[:, :1]), memory, mask, [])
        written = [logits.argmax(dim=-1)]
        if step is None:
            # Export takes a size of one for a fixed one: let two tokens be kept.
            arguments = written[0], memory, mask, plain(written[0], memory, mask, kept)[1]
            ours, theirs = {0: b, 2: k}, {0: b, 2: s}
            each = (ours, ours), (theirs, theirs)
            shapes = {0: b}, {0: b, 1: s}, {0: b, 1: s}, [each] * 2
            step = exported(plain, arguments, shapes)
        eager = kept
        for _ in range(steps):
            expected, eager = plain(written[-1], memory, mask, eager)
            logits, kept = step(written[-1], memory, mask, kept)
            assert difference(logits, expected) <= 1e-12
            written.append(logits.argmax(dim=-1))
        assert kept[1][0][0].shape == (batch, 4, steps + 1, 8)
        written = cut(torch.cat(written, dim=1), eos=1)
        wanted = model.generate(src, mask, max_new_tokens=steps + 1)
        assert written == cut(wanted, eos=1), (batch, s_len)
