"""A server that draws: OpenAI's images interface, AUTOMATIC1111's, and a page for the browser.

    request -> security -> openai | sdapi | studio -> Draw -> queue -> workers (a process per device) -> images

The server's own process loads neither torch nor a model, so it answers at once and whatever the workers do; they hold
the models. What goes between them stands in `work.py`.
"""
