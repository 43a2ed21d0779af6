"""Writes GGUF files from whatever ltxlite loads: planned first, by row chunks, resumable, verified.

run: the conversion as a whole.  plan: names, formats, keys.  layout: the file's header.
rows: chunks of rows, encoded.  file: the partial file and its journal.  verify: reading it back.
lora: LoRA files baked in.
weighting: importance of columns.  inferred: a configuration from shapes.  vocabulary: a tokenizer
from its JSON.  source: what identifies an input.  gemma: the text encoder's particulars.
companions: advice.
"""
