"""Chat completions.

Read ``body`` first: what clients send. Then ``chat``: the jobs for the model, and the answer.
"""
