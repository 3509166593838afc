"""How fast T5 writes: ours, ``transformers``, and CTranslate2 where it is installed.

    python benchmarks/decoding_speed.py             all rows, ten minutes
    python benchmarks/decoding_speed.py --quick     the small model, a minute

All write the same number of tokens for the same random sources, with the same
random weights, in float32, and the tokens are compared, too. CTranslate2 (``pip
install ctranslate2``) reads what ``save_pretrained`` wrote, by its own converter.
A ratio above 1 means that ours takes less time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from bench import compare, save, speed, spread, table
from torch import Tensor

from t5_book.pretrained import save_pretrained
from t5_book.t5 import T5

HERE = Path(__file__).parent
# Vocabulary, dim, depth of each stack, heads, features of a head, hidden features.
SHAPES = {
    "tiny": (512, 32, 1, 2, 16, 64),
    "d 256": (8192, 256, 4, 8, 32, 1024),
    "t5-small": (32128, 512, 6, 8, 64, 2048),
}
# Batch and beams
WORKS = [(1, 1), (16, 1), (1, 4), (4, 4)]


def make_t5(shape: tuple[int, ...], seed: int = 0) -> T5:
    """A T5 of this shape with random weights, whose texts vary."""
    vocabulary, dim, depth, heads, dim_head, hidden = shape
    torch.manual_seed(seed)
    side = dict(num_tokens=vocabulary, depth=depth, heads=heads)
    side |= dict(dim_head=dim_head, mlp_mult=hidden / dim)
    sides = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
    model = T5(dim=dim, **sides, tie_head=False).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    return model


def saved(model: T5, folder: Path) -> Path:
    """Write a model, and a tokenizer with a name for each of its tokens."""
    save_pretrained(model, folder)
    # A tokenizer of bytes needs no file; here it only names the tokens.
    names = model.config.dec_num_tokens - 259  # besides pad, eos, unk and 256 bytes
    tokenizer = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": names}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def converted(model: T5, folder: Path, threads: int = 1):
    """The model in CTranslate2, and the names of its tokens."""
    from ctranslate2 import Translator
    from ctranslate2.converters import TransformersConverter

    source = saved(model, folder / "saved")
    target = folder / "converted"
    TransformersConverter(str(source)).convert(str(target))
    names = json.loads((target / "shared_vocabulary.json").read_text())
    engine = Translator(
        str(target),
        device="cpu",
        compute_type="float32",
        inter_threads=1,
        intra_threads=threads,
    )
    return engine, names


def write_converted(converted, src: Tensor, tokens: int, beams: int) -> Tensor:
    """What CTranslate2 writes for each source, ids ``[b tokens]``."""
    engine, names = converted
    found = engine.translate_batch(
        [[names[i] for i in row] for row in src.tolist()],
        beam_size=beams,
        max_decoding_length=tokens,
        min_decoding_length=tokens,
        # Its default cuts a source; theirs ends with the last token, as ours.
        max_input_length=0,
    )
    ids = {name: i for i, name in enumerate(names)}
    return torch.tensor([[ids[name] for name in one.hypotheses[0]] for one in found])


def writers(model, reference, engine, b, beams, tokens, length) -> dict[str, Callable]:
    """The same work by each of them."""
    generator = torch.Generator().manual_seed(1)
    src = torch.randint(3, model.config.enc_num_tokens, (b, length), generator=generator)
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams)
    mask = torch.ones_like(src)
    works = {
        "ours": lambda: model.generate(src, **options),
        "transformers": lambda: reference.generate(
            input_ids=src, attention_mask=mask, do_sample=False, **options
        )[:, 1:],
    }
    if engine is not None:
        works["ctranslate2"] = lambda: write_converted(engine, src, tokens, beams)
    return works


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the rows that are the same."""
    return (ours == theirs).all(dim=1).float().mean().item()


def measure(shape: str, rounds: int, tokens: int, length: int) -> list[dict]:
    """All rows of one shape."""
    model = make_t5(SHAPES[shape])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = transformers.T5ForConditionalGeneration.from_pretrained(
            saved(model, folder / "theirs")
        ).eval()
        engine = None
        if find_spec("ctranslate2"):
            engine = converted(model, folder, torch.get_num_threads())
    rows = []
    for b, beams in WORKS:
        works = writers(model, reference, engine, b, beams, tokens, length)
        written = {name: work() for name, work in works.items()}
        seconds = compare(works, rounds=rounds)
        for peer in list(works)[1:]:
            rows.append(
                {
                    "shape": shape,
                    "batch": b,
                    "beams": beams,
                    "against": peer,
                    "ratio, CPU time": speed(seconds, "ours", peer),
                    "ratio, wall time": speed(seconds, "ours", peer, "wall"),
                    "ours, ms a token": 1e3
                    * spread(seconds["ours"]["cpu"])["median"]
                    / tokens,
                    "same texts": agreement(written["ours"], written[peer]),
                }
            )
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--output", type=Path, default=HERE / "decoding_speed.json")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    shapes = options.shape or (["d 256"] if options.quick else ["d 256", "t5-small"])
    tokens, rounds = (24, 3) if options.quick else (64, options.rounds)
    rows = []
    for shape in shapes:
        rows += measure(shape, rounds, tokens, length=64)
    print(table(rows))
    if not options.quick:
        save(options.output, {"tokens": tokens, "source": 64, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
