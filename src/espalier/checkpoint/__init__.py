"""Names to tensors on disk: safetensors files, Hugging Face directories, atomic writes, fingerprints.

Imports torch lazily where it can; never transformers, never peft, never pickle.
"""
