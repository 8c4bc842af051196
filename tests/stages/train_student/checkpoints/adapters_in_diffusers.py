"""What exported adapters change in whatever diffusers and peft come first on the path.

    python adapters_in_diffusers.py FOLDER

FOLDER holds transformer/, the adapters and inputs.pt; change.pt is written beside them.
"""

import sys
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

folder = Path(sys.argv[1])
transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
pipeline = CogVideoXPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=None,
    transformer=transformer,
    scheduler=CogVideoXDDIMScheduler(),
)
inputs = torch.load(folder / "inputs.pt")
with torch.no_grad():
    before = transformer(**inputs)[0]
    pipeline.load_lora_weights(str(folder))
    after = pipeline.transformer(**inputs)[0]
torch.save(after - before, folder / "change.pt")
