"""Continuous batching over compressed pages.

settings.py       what an engine is made with
model.py          what a model's layers look like to the cache
page_codes.py     how 64 tokens become a page, and attention on pages: a backend's codes
exact_pages.py    the same, uncompressed
exact_decode.py   attention of a decode step on uncompressed pages, a Triton kernel
page_table.py     which pages a sequence holds, and those of a step see
kinds.py          kinds of layers by how far they see, which free pages at different times
pages.py          the pool: ids, reference counts, one slab per layer
store.py          pages, exact tokens and offsets of every request
slot_offsets.py   what is taken off the tokens of a sequence before they are kept
decode_step.py    the decode step, launched
decode_graphs.py  the decode step as CUDA graphs
prefill_step.py   chunks of prompts
prefill_flash.py  their attention on a GPU
merge_kernel.py   merges partial results, a Triton kernel
prefix.py         complete pages shared by the hash of their tokens
request_pages.py  which pages a request begins with, takes, shares and gives back
snapshots.py      the state after a shared prefix that is not in its pages
sampling.py       from logits to a token, per request
grammar.py        JSON schema and regex constraints
text.py           token ids to text, stop strings
sequence.py       one request's state and what it reports
runner.py         the model's forward pass for both kinds of step
scheduler.py      who is admitted, prefilled, decoded, preempted
engine.py         the thread, the queue in front of it, its figures
"""
