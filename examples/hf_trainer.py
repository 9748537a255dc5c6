"""The Trainer of transformers with an Espalier delta: attach before, save after; the Trainer needs to know nothing of it.

    python examples/hf_trainer.py [--steps 20] [--out hf-trainer-out]

Needs the package ``accelerate``, as the Trainer does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import espalier
from espalier.bundled.corpus import bundled_files

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--steps", type=int, default=20)
arguments.add_argument("--out", type=Path, default=Path("hf-trainer-out"))
a = arguments.parse_args()

model = espalier.load("seedling")
tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
ids = [i for path in bundled_files("email:train") for i in tokenizer(path.read_text(), verbose=False).input_ids]
rows = [{"input_ids": ids[start : start + 256]} for start in range(0, len(ids) - 256, 256)]

espalier.attach(model, "dora", rank=8, alpha=16.0, seed=0)
with tempfile.TemporaryDirectory() as scratch:
    settings = TrainingArguments(
        output_dir=scratch, max_steps=a.steps, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=5,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)).train()
espalier.save(model, a.out, tokenizer=tokenizer)

information = espalier.info(str(a.out))
print(f"the delta is in {a.out}: {information['parameters']} parameters updated, {information['numbers']:,} numbers")
