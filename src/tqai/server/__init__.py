"""`tqai serve`: an OpenAI-compatible server whose continuous batching lives in compressed pages.

engine/   pages, prefix cache, scheduler, sampling; knows requests as token ids, no HTTP
api/      the HTTP interface over an engine
"""
