"""Released weights in and out, in the files that transformers uses.

Built in chapter 15, "Load the released T5" (chapters/pretrained.md). Edit
the chapter, not this file.
"""

import json
import zipfile
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.config import T5Config
from t5_book.hub import find_release, find_weights
from t5_book.t5 import T5
from t5_book.tokenizer import Tokenizer

__all__ = [
    "from_pretrained",
    "load_pretrained",
    "load_tokenizer",
    "released_name",
    "save_pretrained",
]


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | ByteTokenizer:
    """Load the tokenizer of a released T5.

    Args:
        name_or_path: a folder, or a name on the hub; see ``find_release``.

    Raises:
        ValueError: if there is no ``spiece.model``, and it is no ByT5.
        FileNotFoundError, ImportError, ConnectionError: as
            ``find_release``.

    Built in chapter 14, "Read bytes instead of words".
    """
    files = "config.json", "tokenizer_config.json", "spiece.model"
    folder = find_release(name_or_path, *files)
    values = {}
    for file in filter(Path.is_file, (folder / name for name in files[:2])):
        values |= json.loads(file.read_text("utf-8"))
    if (folder / files[2]).is_file():
        extra_ids = values.get("extra_ids", 100)
        return Tokenizer.load(folder / files[2], extra_ids=extra_ids)
    named = values.get("tokenizer_class") == "ByT5Tokenizer"
    if not (named or values.get("vocab_size") == 384):
        raise ValueError(f"{folder} has no spiece.model, and is no ByT5")
    return ByteTokenizer()


_TABLE, _HEAD = "shared.weight", "lm_head.weight"
_TABLES = (_TABLE, "encoder.embed_tokens.weight",
           "decoder.embed_tokens.weight", _HEAD)
_BIAS = "SelfAttention.relative_attention_bias.weight"
_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_PLACES = {
    "attention_norm": "0.layer_norm",
    "attention": "0.SelfAttention",
    "self_norm": "0.layer_norm",
    "self_attention": "0.SelfAttention",
    "cross_norm": "1.layer_norm",
    "cross_attention": "1.EncDecAttention",
    "feed_forward_norm": "{last}.layer_norm",
    "feed_forward": "{last}.DenseReluDense",
}


def released_name(name: str) -> str:
    """Translate the name of a parameter of ours to the released files'.

    Built in chapter 15, "Load the released T5" (transformers,
    ``modeling_t5.py``).
    """
    stack, part, *rest = name.split(".")
    if stack in ("enc_emb", "head"):
        return _TABLE if stack == "enc_emb" else _HEAD
    if part == "norm":
        return f"{stack}.final_layer_norm.weight"
    if part == "biases":
        return f"{stack}.block.{rest[0]}.layer.0.{_BIAS}"
    if part != "blocks":
        return name  # no parameter of a T5
    block, place, *weight = rest
    layer = _PLACES[place].format(last=1 if stack == "encoder" else 2)
    return ".".join([stack, "block", block, "layer", layer, *weight])


_SIZES = {"num_tokens": "vocab_size", "heads": "num_heads",
          "dim_head": "d_kv", "mlp_mult": "d_ff"}
_ENTRIES = {
    "dim": "d_model",
    "enc_depth": "num_layers",
    "dec_depth": "num_decoder_layers",
    "feed_forward": "feed_forward_proj",
    "dropout": "dropout_rate",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "pad_id": "pad_token_id", "eos_id": "eos_token_id",
    "start_id": "decoder_start_token_id",
    "scale_logits": "scale_decoder_outputs",
} | {f"{side}_{o}": t for side in ("enc", "dec") for o, t in _SIZES.items()}


def _keywords(values: dict) -> dict:
    """Translate a ``config.json`` to keywords of ``T5``, the head apart."""
    values = {name: v for name, v in values.items() if v is not None}
    kind, eps = values.get("model_type"), values.get("layer_norm_epsilon")
    if kind not in ("t5", "mt5", "umt5") or eps not in (1e-6, None):
        raise ValueError(
            f"config.json has model_type {kind!r}, layer_norm_epsilon {eps}"
            "; this book loads 't5', 'mt5' and 'umt5' with 1e-06"
        )
    if lacking := {"d_model", "num_layers", *_SIZES.values()} - {*values}:
        raise ValueError(f"config.json lacks {', '.join(sorted(lacking))}")
    values = {
        "feed_forward_proj": "relu" if kind == "t5" else "gated-gelu",
        "dropout_rate": 0.1,
        "num_decoder_layers": values["num_layers"],
        "scale_decoder_outputs": False if kind == "mt5" else None,
        "decoder_start_token_id": values.get("pad_token_id", 0),
    } | values
    config = {o: values[t] for o, t in _ENTRIES.items() if t in values}
    for ours in ("enc_mlp_mult", "dec_mlp_mult"):
        config[ours] = values["d_ff"] / values["d_model"]
    return config | {"bias_per_layer": kind == "umt5"}


def _open(file: Path) -> dict:
    """For each tensor in a file, the function that reads it."""
    try:
        if file.suffix == ".safetensors":
            held = safe_open(file, "pt", backend="pread")
            return {n: partial(held.get_tensor, n) for n in held.keys()}
        mapped = zipfile.is_zipfile(file)  # before 2020 they were none
        held = torch.load(file, "cpu", weights_only=True, mmap=mapped)
        return {str(name): tensor.clone for name, tensor in held.items()}
    except OSError:
        raise
    except Exception as error:  # damaged files break in many ways
        hint = f"nothing in it was run ({type(error).__name__})"
        message = f"{file} is damaged, or holds more than tensors; {hint}"
        raise ValueError(message) from None


def _add(weights: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Keep a tensor, unless it is a copy of the embedding table."""
    for twin in _TABLES if name in _TABLES else ():
        if twin in weights and torch.equal(weights[twin], tensor):
            weights[min(name, twin, key=_TABLES.index)] = weights.pop(twin)
            return
    if not name.endswith("EncDecAttention.relative_attention_bias.weight"):
        weights[name] = tensor  # a bias of cross-attention: no reader


def _read(files: list[Path], dtype, device) -> dict[str, Tensor]:
    """Read tensor by tensor, each converted before the next is read."""
    if dtype not in (None, *_FLOATS):
        raise ValueError(f"dtype is {dtype!r}; pass one of {_FLOATS}")
    weights = {}
    for file in files:
        readers = _open(file).items()
        for name, read in tqdm(readers, file.name, unit="tensor", delay=2):
            tensor = read()
            if tensor.dtype not in _FLOATS:
                wrong = f"{name} is {tensor.dtype}"
                raise ValueError(f"{wrong}; weights must be of {_FLOATS}")
            _add(weights, name, tensor.to(device, dtype))
    if tables := [name for name in _TABLES[:3] if name in weights]:
        weights[_TABLE] = weights.pop(tables[0])
    kinds = {w.dtype for w in weights.values()} or {dtype}
    kind = reduce(torch.promote_types, kinds)
    return {name: weights.pop(name).to(kind) for name in [*weights]}


def _check(found: dict, own: dict, folder: Path) -> None:
    """Name the tensors that are missing, surplus or misshapen."""
    wanted = {released_name(n): weight for n, weight in own.items()}
    missing = [f"{name} is missing" for name in wanted if name not in found]
    surplus = [f"{name} is surplus" for name in found if name not in wanted]
    misshapen = []
    for name in [name for name in wanted if name in found]:
        shape, right = tuple(found[name].shape), tuple(wanted[name].shape)
        if shape != right:
            misshapen.append(f"{name} has shape {shape}, not {right}")
    kinds = [kind for kind in (missing, surplus, misshapen) if kind]
    if kinds:
        wrong = f"{sum(map(len, kinds))} tensors in {folder} do not fit"
        shown = [x for k in kinds for x in k[:20] + ["..."] * (len(k) > 20)]
        raise ValueError(f"{wrong} config.json:\n" + "\n".join(shown))


def load_pretrained(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, kind: type[T5] = T5,
) -> T5:
    """Load a released T5, or one that ``save_pretrained`` wrote.

    ``name_or_path`` is a folder, a file with ``config.json`` beside it, or
    a name on the hub. ``dtype`` (default: the files') and ``device`` are
    those of the weights; ``kind`` is ``T5`` or a class derived from it.

    Returns the model, in evaluation mode. Raises ValueError if the files
    are damaged, no T5's, or do not fit together (the message names the
    tensors that do not), and whatever ``find_weights`` raises.

    Built in chapter 15, "Load the released T5".
    """
    files = find_weights(name_or_path)
    path = files[0].with_name("config.json")
    values = json.loads(path.read_text("utf-8"))
    config = _keywords(values)
    weights = _read(files, dtype, device or torch.get_default_device())
    blocks = {n.split(".")[2] for n in weights if n.endswith(_BIAS)}
    if max(config["enc_depth"], config["dec_depth"]) > 1:
        config["bias_per_layer"] = blocks > {"0"}
    if not (tied := _HEAD not in weights):
        config["scale_logits"] = values.get("scale_logits")
    with torch.device("meta"):
        model = kind(**config, tie_head=tied)
    own = dict(model.named_parameters())
    _check(weights, own, path.parent)
    ours = {name: weights[released_name(name)] for name in own}
    model.load_state_dict(ours, strict=False, assign=True)
    if model.config.tie_head:
        model.head.weight = model.dec_emb.weight
    return model.eval()


def _entries(config: T5Config) -> dict:
    """The ``config.json`` of a model, or ValueError if there is none."""
    own, values = dict(vars(config)), {}
    own["scale_logits"] = config.logit_scale != 1
    wrong = [] if config.tie_token_emb else ["two embedding tables"]
    for name in ("enc_mlp_mult", "dec_mlp_mult"):
        own[name] = round(own[name] * config.dim)
    for ours, theirs in _ENTRIES.items():
        if values.setdefault(theirs, own[ours]) != own[ours]:
            wrong.append(f"{theirs} {values[theirs]} and {own[ours]}")
    if wrong:
        raise ValueError(
            f"transformers has no T5 with {', '.join(wrong)}; keep this "
            "one as model.state_dict() and model.config.to_json()"
        )
    kind = "umt5" if config.bias_per_layer else "t5"
    return values | {
        "architectures": [f"{kind.upper()}ForConditionalGeneration"],
        "is_encoder_decoder": True, "model_type": kind,
        "scale_logits": None if config.tie_head else own["scale_logits"],
        "tie_word_embeddings": config.tie_head,
    }


def save_pretrained(model: T5, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` for transformers.

    Raises ValueError, and writes nothing, if the two sides of ``model``
    differ in more than depth: the format has no words for that.

    Built in chapter 15, "Load the released T5".
    """
    entries, own = _entries(model.config), model.named_parameters()
    with torch.device("meta"):
        plain = dict(T5(**vars(model.config)).named_parameters())
    weights = {released_name(n): w.detach().contiguous() for n, w in own}
    _check(weights, plain, "the model")
    entries["dtype"] = str(model.head.weight.dtype).removeprefix("torch.")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, indent=2) + "\n"
    with TemporaryDirectory(prefix=".part-", dir=folder) as part:
        Path(part, "config.json").write_text(text, "utf-8")
        save_file(weights, f"{part}/model.safetensors", {"format": "pt"})
        for file in Path(part).iterdir():
            file.replace(folder / file.name)


def from_pretrained(cls, name_or_path, *, dtype=None, device=None):
    """Load a released T5, as ``t5_book.load_pretrained`` says."""
    return load_pretrained(name_or_path, dtype=dtype, device=device, kind=cls)


T5.from_pretrained = classmethod(from_pretrained)
T5.save_pretrained = save_pretrained
