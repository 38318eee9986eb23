"""Continuous batching over compressed pages.

settings.py       what an engine is made with
model.py          what a model's layers look like to the cache
page_codes.py     how 64 tokens become a page, and attention on pages: a backend's codes
exact_pages.py    the same, uncompressed
exact_decode.py   attention of a decode step on uncompressed pages, a Triton kernel
page_table.py     which pages the sequences of a step see
pages.py          the pool: ids, reference counts, one slab per layer
store.py          exact tokens of every slot, and the decode step
decode_graphs.py  the decode step as CUDA graphs
prefill_step.py   chunks of prompts
prefill_flash.py  their attention on a GPU
merge_kernel.py   merges partial results, a Triton kernel
prefix.py         complete pages shared by the hash of their tokens
sampling.py       from logits to a token, per request
grammar.py        JSON schema and regex constraints
text.py           token ids to text, stop strings
sequence.py       one request's state and what it reports
runner.py         the model's forward pass for both kinds of step
scheduler.py      who is admitted, prefilled, decoded, preempted
engine.py         the thread, the queue in front of it, its figures
"""
