"""What a chat model writes, taken apart: reasoning, content and tool calls; text in, deltas out, no model needed."""
