"""The command line: one file per verb, named as the verb.

A verb's file holds a frozen dataclass `Options` and a function `run(options) -> int`. The docstring of `Options` says
what the verb does and ends with an example; every field has a docstring, and `json: bool = False` is among them. The
result of `run` is the exit code: 0 done, 1 the answer is no. Wrong input is an InputError, from wherever it is found.
Heavy modules are imported inside `run`, so that help comes at once. A new verb is its file and a line in `main.VERBS`.
"""
