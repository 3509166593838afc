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

from t5_book.t5 import T5
from tests.conftest import difference, padding_masks, random_ids

SIDE = dict(num_tokens=64, depth=1, heads=4, dim_head=8, mlp_mult=2)
# Batch and lengths: some equal each other, and the heads, and the batch.
SHAPES = [(2, 9, 5), (3, 40, 12), (4, 4, 4), (2, 7, 140), (5, 140, 5)]
b, s, k = Dim("b"), Dim("s"), Dim("k")


def small_t5(depth=1, **extra):
    """A T5 that compiles in seconds, with biases that show."""
    torch.manual_seed(0)
    side = SIDE | {"depth": depth}
    sides = {f"{n}_{k}": v for n in ("enc", "dec") for k, v in side.items()}
    model = T5(dim=24, **sides, **extra).eval().requires_grad_(False)
    for stack in (model.encoder, model.decoder):
        for bias in stack.biases:
            bias.table.weight.normal_()
    return model


def inputs(batch, s_len, t_len):
    """Sources, targets, and a mask with padding on both sides."""
    src = random_ids(batch, s_len, high=64)
    return src, random_ids(batch, t_len, 1, 64), padding_masks(batch, s_len)


@pytest.fixture(autouse=True)
def compile_anew():
    """Forget what was compiled before, and take floats as they are.

    Otherwise ``dynamic=True`` makes a variable of every float, such as the
    epsilon of a norm, to find out that it is none, and begins again: the
    same graph in twice the time.

    inductor also keeps what it compiled on disk. The key holds the graph
    and the settings, but not the processor's vector instructions (torch
    2.13, ``FxGraphHashDetails``). So after a run with AVX-512, a run with
    ``ATEN_CPU_CAPABILITY=avx2`` gets loops that step by 16 floats, computes
    8 of each 16 and leaves the rest uninitialised. With ``default``, the
    old code doesn't even compile. Run these lines with ``avx512``, then
    with ``avx2``, to see it::

        import torch
        add = torch.compile(lambda x: x + 1)
        print(add(torch.zeros(32)))

    We add the instructions to the key.
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


@pytest.mark.rounding
@pytest.mark.parametrize(
    "backend, bound",
    [
        ("aot_eager", 1e-6),
        pytest.param("inductor", 1e-5, marks=needs_compiler),  # the default
    ],
)
def test_one_graph_serves_every_length(backend, bound):
    model = small_t5(feed_forward="gated-gelu", tie_head=False)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=counter
    )
    for shape in SHAPES:
        batch = inputs(*shape)
        assert difference(compiled(*batch), model(*batch)) <= bound
    assert counter.frame_count == 1


def test_an_encoder_by_itself_is_one_graph():
    encoder = small_t5(depth=2).encoder
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    x, mask = torch.randn(3, 9, 24), padding_masks(3, 9)
    assert difference(compiled(x, mask), encoder(x, mask)) <= 1e-6


def test_a_decoder_by_itself_is_one_graph():
    decoder = small_t5(depth=2).decoder
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    x, memory = torch.randn(3, 9, 24), torch.randn(3, 7, 24)
    masks = padding_masks(3, 7), padding_masks(3, 9)
    ours, plain = compiled(x, memory, *masks), decoder(x, memory, *masks)
    assert difference(ours, plain) <= 1e-6


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
        cache.length = cache.blocks[0].target[0].shape[2]
        logits = self.model.decode(token, cache=cache)
        return logits, tensors_of(cache)


def tensors_of(cache):
    """What a cache holds: keys and values of target and of source."""
    return [(block.target, block.source) for block in cache.blocks]


def reloaded(program):
    """A program after a round trip through a file, ready to be called."""
    file = BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_the_encoder_can_be_exported():
    model = small_t5()
    src, _, mask = inputs(3, 9, 1)
    shapes = {0: b, 1: s}, {0: b, 1: s}
    program = export(Encode(model), (src, mask), dynamic_shapes=shapes)
    encode = reloaded(program)
    for batch, s_len in [(3, 9), (4, 4), (1, 1), (2, 140), (7, 1)]:
        src, _, mask = inputs(batch, s_len, 1) if batch > 1 else (
            random_ids(1, s_len, high=64), None, torch.ones(1, s_len).bool()
        )  # fmt: skip
        assert difference(encode(src, mask), model.encode(src, mask)) <= 1e-6


def first_step(model, src, mask):
    """Encode, and write the first token; also the cache after it."""
    memory = model.encode(src, mask)
    cache = model.decoder.new_cache(memory, mask)
    logits = model.decode(torch.zeros_like(src[:, :1]), cache=cache)
    return logits.argmax(dim=-1), memory, tensors_of(cache)


@pytest.fixture(scope="module")
def exported_step():
    """A model of two blocks, and a step of its decoder as a program.

    In float64, since the tokens that they write are compared.
    """
    model = small_t5(depth=2).double()
    src, _, mask = inputs(3, 9, 1)
    token, memory, kept = first_step(model, src, mask)
    # Export takes a size of one for a fixed one: let two tokens be kept.
    _, kept = Step(model)(token, memory, mask, kept)
    ours, theirs = {0: b, 2: k}, {0: b, 2: s}
    shapes = (
        {0: b}, {0: b, 1: s}, {0: b, 1: s},
        [((ours, ours), (theirs, theirs))] * 2,
    )  # fmt: skip
    arguments = token, memory, mask, kept
    program = export(Step(model), arguments, dynamic_shapes=shapes)
    return model, reloaded(program)


@pytest.mark.parametrize(
    "batch, s_len, steps", [(2, 40, 132), (3, 9, 4), (4, 4, 9)]
)
def test_a_step_of_the_decoder_can_be_exported(
    exported_step, batch, s_len, steps
):
    """A loop around the program writes what ``generate`` writes."""
    model, step = exported_step
    src, _, mask = inputs(batch, s_len, 1)
    token, memory, kept = first_step(model, src, mask)
    written, eager = [token], kept
    for _ in range(steps):
        expected, eager = Step(model)(token, memory, mask, eager)
        logits, kept = step(token, memory, mask, kept)
        assert difference(logits, expected) <= 1e-12
        token = logits.argmax(dim=-1)
        written.append(token)
    assert kept[1][0][0].shape == (batch, 4, steps + 1, 8)
    wanted = model.generate(src, mask, max_new_tokens=steps + 1)
    written = torch.cat(written, dim=1)[:, : wanted.shape[1]]
    ended = (wanted == 1).cumsum(dim=1) - (wanted == 1).int() > 0
    assert torch.equal(written.masked_fill(ended, 0), wanted)
