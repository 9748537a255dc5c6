"""One's own training loop: attach updates to any transformers model, train, save the delta, take it off again.

    python examples/plain_loop.py [--steps 20] [--out plain-loop-out]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import espalier
from espalier.bundled.corpus import bundled_files

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--steps", type=int, default=20)
arguments.add_argument("--out", type=Path, default=Path("plain-loop-out"))
a = arguments.parse_args()

torch.manual_seed(0)
model = espalier.load("seedling", dtype="fp32")
tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
texts = [path.read_text() for path in bundled_files("asyncio:train")]
ids = [i for text in texts for i in tokenizer(text, verbose=False).input_ids]
rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)

# from here on only the delta's tensors require gradients
espalier.attach(model, "lora", targets="attention,mlp", rank=8, alpha=16.0, seed=0)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
print(f"{sum(p.numel() for p in trained):,} numbers train")

model.train()
for step in range(a.steps):
    batch = rows[torch.randint(len(rows), (8,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == a.steps - 1:
        print(f"step {step + 1}: loss {loss.item():.3f}")

espalier.save(model, a.out, tokenizer=tokenizer)

# the model as it was, and the same delta put on again from its files
model.eval()
with torch.no_grad():
    adapted = model(rows[:1]).logits
    espalier.detach(model)
    plain = model(rows[:1]).logits
    again = espalier.load("seedling", [a.out], dtype="fp32")(rows[:1]).logits
print(f"the delta changes logits by up to {(adapted - plain).abs().max():.2f}; reloaded, it differs by {(again - adapted).abs().max():.1e}")
print(f"the delta is in {a.out}; PEFT can load it too")
