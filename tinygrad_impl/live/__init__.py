"""A page on which models write side by side, word by word: `compare --serve`.

    settings.py       what a visitor asks for: the fields of the page's form, read and checked
    writing.py        the models write: a stream of events for each request
    turns.py          one visitor after the other
    guard.py          what is answered, and to whom
    app.py            the page and its events by HTTP (Starlette)
    serve.py          the program: loads models, listens, writes
    page.html, .css, .js

One thread computes, the program's first; the web server has another, and hands it requests through `Turns`.
"""
