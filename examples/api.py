# %% [markdown]
# # hap-onnx from Python
#
# Run the whole, `python examples/api.py`, or cell by cell in an editor that knows `# %%`.
# The model is that of `python -m hap_onnx.example`: a small residual network that reads handwritten digits.

# %% A model, and data for it
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

import hap_onnx
from hap_onnx.example import export_network, load_digits, train_network

folder = Path("example") / "api"
folder.mkdir(parents=True, exist_ok=True)
train, test = load_digits()
export_network(train_network(train, epochs=10), folder / "digits.onnx")
data = {"image": train.images, "labels": train.labels}  # arrays are data as well as files are

# %% What can shrink, and what cannot
found = hap_onnx.inspect(folder / "digits.onnx")
print(f"{found.prunable.params_ratio:.0%} of the parameters are in layers whose channels can go")
for entry in found.frozen:
    print(f"stays: {entry.node}, because {entry.reason}")

# %% A look before the leap: what a budget would do
plan = hap_onnx.compress(folder / "digits.onnx", data, keep_macs=0.5, dry_run=True).plan
for group in plan.groups:
    print(f"{group.name}: {group.kept} of {group.size} channels stay, {group.why}")

# %% Compress; the reported quality is that of data which was used for nothing else
test.save(folder / "test.npz")
report = hap_onnx.compress(
    folder / "digits.onnx", data, val=folder / "test.npz", keep_macs=0.5,
    output=folder / "small.onnx", save_plan=folder / "plan.json",
)  # fmt: skip
low, high = report.quality.interval
print(f"{report.before.macs:,} -> {report.after.macs:,} MACs, {report.latency.ratio:.2f} of the time")
print(f"accuracy {report.quality.before:.2%} -> {report.quality.after:.2%} (drop {low:.2%} to {high:.2%})")

# %% The result is an ordinary ONNX model
session = ort.InferenceSession(folder / "small.onnx", providers=["CPUExecutionProvider"])
(scores,) = session.run(None, {"image": test.images})
print(f"by hand: {(scores.argmax(1) == test.labels).mean():.2%}")

# %% The plan makes the same bytes again, without data
hap_onnx.apply_plan(folder / "digits.onnx", folder / "plan.json", output=folder / "again.onnx")
print("same bytes:", (folder / "again.onnx").read_bytes() == (folder / "small.onnx").read_bytes())

# %% A gate that is not met raises, with the figures
try:
    hap_onnx.compress(folder / "digits.onnx", data, val=folder / "test.npz", keep_macs=0.1, max_drop=0.001,
                      output=folder / "tiny.onnx")  # fmt: skip
except hap_onnx.TargetError as error:
    print(f"refused: {error}")

# %% Two models compared, as CI would
judged = hap_onnx.validate(folder / "digits.onnx", folder / "small.onnx", folder / "test.npz", max_drop=0.02)
print("passed" if judged.passed else "failed", judged.fidelity)

# %% The model as a torch module, for whatever you want to do with it
twin = hap_onnx.load_twin(folder / "small.onnx")
outputs = twin({"image": torch.from_numpy(test.images[:8])})
print(np.abs(outputs["scores"].detach().numpy() - scores[:8]).max(), "is how far torch is from onnxruntime")
