"""A text encoder: a small transformer that tells from a docstring which library it was written for.

    python examples/text_encoder.py

The text is real and on every machine that runs this: docstrings of libraries that hap-onnx and its examples
depend on. Whole heads of attention and the inner width of the MLPs shrink; what is padding stays out of it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hap_onnx

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "torch")
PER_LIBRARY, LENGTH, N_WORDS = 600, 32, 2000
FOLDER = Path("example") / "text_encoder"


def read_docstrings(library: str) -> list[list[str]]:
    """Return the words of docstrings in a library's files, without the names of the libraries."""
    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, None] = {}  # a text that is there twice could be in both parts of the data
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "test" in path.as_posix():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[" ".join((ast.get_docstring(node) or "").lower().split())] = None
        if len(found) > 2 * PER_LIBRARY:
            break
    texts = [[word for word in re.findall("[a-z]+", text) if word not in LIBRARIES] for text in found]
    return [words for words in texts if len(words) >= 8]


def make_data(*, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [N, LENGTH], 0 where the text has ended, and labels [N], for training and for testing."""
    rng = np.random.default_rng(seed)
    pairs = []
    for label, library in enumerate(LIBRARIES):
        texts = read_docstrings(library)
        pairs += [(texts[index], label) for index in rng.permutation(len(texts))[:PER_LIBRARY]]
    pairs = [pairs[index] for index in rng.permutation(len(pairs))]
    n_train = len(pairs) * 3 // 4
    counts = Counter(word for words, _ in pairs[:n_train] for word in words[:LENGTH])
    number = {word: index for index, (word, _) in enumerate(counts.most_common(N_WORDS - 2), start=2)}
    tokens = np.zeros((len(pairs), LENGTH), np.int64)
    for row, (words, _) in zip(tokens, pairs, strict=True):
        row[: len(words)] = [number.get(word, 1) for word in words[:LENGTH]]
    labels = np.array([label for _, label in pairs])
    return tokens[:n_train], labels[:n_train], tokens[n_train:], labels[n_train:]


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        y = self.norm1(x)
        layers = self.query, self.key, self.value
        heads = [layer(y).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for layer in layers]
        y = F.scaled_dot_product_attention(*heads, attn_mask=is_text[:, None, None, :])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Tokens [N, LENGTH] to scores [N, 5]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(N_WORDS, width), nn.Parameter(torch.randn(LENGTH, width) / 10)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(LIBRARIES))

    def forward(self, tokens: Tensor) -> Tensor:
        is_text = tokens != 0
        x = self.words(tokens) + self.places
        for block in self.blocks:
            x = block(x, is_text)
        weights = is_text.float()[:, :, None]
        return self.head((self.norm(x) * weights).sum(1) / weights.sum(1))


def train(tokens: np.ndarray, labels: np.ndarray, *, epochs: int) -> Encoder:
    torch.manual_seed(0)
    network = Encoder()
    inputs, targets = torch.from_numpy(tokens), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(32):
            loss = F.cross_entropy(network(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokens, labels, tokens_test, labels_test = make_data()
    network = train(tokens, labels, epochs=6)
    torch.onnx.export(
        network, (torch.from_numpy(tokens[:2]),), FOLDER / "encoder.onnx", dynamo=True, verbose=False,
        input_names=["tokens"], output_names=["scores"], external_data=False,
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    np.savez(FOLDER / "calib.npz", tokens=tokens, labels=labels)
    np.savez(FOLDER / "test.npz", tokens=tokens_test, labels=labels_test)

    report = hap_onnx.compress(
        FOLDER / "encoder.onnx", FOLDER / "calib.npz", val=FOLDER / "test.npz", keep_macs=0.6,
        output=FOLDER / "small.onnx",
    )  # fmt: skip
    macs, file = report.after.macs / report.before.macs, report.after.bytes / report.before.bytes
    print(f"{macs:.0%} of the MACs, {report.latency.ratio:.0%} of the time, {file:.0%} of the file")
    print(f"right on {len(labels_test)} docstrings not seen before: {report.quality.before:.1%} before, "
          f"{report.quality.after:.1%} after")  # fmt: skip


if __name__ == "__main__":
    main()
