"""The commands `vllm-qoq` and `merge_tools`: arguments and output, a module for each command.

A command calls one function of the library, which can be called from Python as well. Modules that
take long to import are imported by the handlers, so that --help answers at once.
"""
