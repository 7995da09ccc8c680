"""Splits the text of a chat model into reasoning, content and tool calls. Takes text, gives deltas, needs no model."""
