"""OpenAI's responses: answers that consist of items.

Read ``responses`` first. Then what clients send (``body``, ``input``), and what they get (``object``, ``items``,
``events``).
"""
