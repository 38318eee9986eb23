"""The HTTP interface: OpenAI's endpoints over an engine.

settings.py     keys, limits, names
errors.py       errors in OpenAI's shape
gate.py         keys and body size, before anything is parsed
schemas.py      what chat, completions and tokenize take and return
responses_schemas.py   the same for /v1/responses
context.py      engine and settings as the routes share them; prompts and sampling parameters
generation.py   events of the engine in asyncio, disconnects
tools.py        tool calls in the formats of common chat templates
chat.py, completions.py, responses.py, service.py   the routes
metrics.py      Prometheus metrics
app.py          puts it together
lifecycle.py    uvicorn, signals, draining
allocator.py    glibc's arenas
"""
