"""Continuous batching over compressed pages.

settings.py    what an engine is made with
model.py       what a model's layers look like to the cache
page_codes.py  how 64 tokens become a page, and attention on pages: a backend's codes, or uncompressed
pages.py       the pool: ids, reference counts, one slab per layer
store.py       exact tokens of every slot, and the two kinds of step: decode and prefill
prefix.py      complete pages shared by the hash of their tokens
sampling.py    from logits to a token, per request
grammar.py     JSON schema and regex constraints
text.py        token ids to text, stop strings
sequence.py    one request's state and what it reports
scheduler.py   who is admitted, prefilled, decoded, preempted
engine.py      the thread, the queue in front of it, its figures
"""
