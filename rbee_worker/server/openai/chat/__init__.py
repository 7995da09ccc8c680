"""Chat completions.

Read ``body`` first: what is sent. Then ``chat``: what is asked of the model, and the answer.
"""
