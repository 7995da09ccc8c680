"""OpenAI's responses: answers made of items.

Read ``responses`` first, then what comes in (``body``, ``input``) and what goes out (``object``, ``items``,
``events``).
"""
