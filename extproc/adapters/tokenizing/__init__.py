"""Prompts to token ids, as the engine will have them, so that what it told of its cache can be matched.

folder      a model's tokenizer and chat templates
piece       part of a text that is tokenized alone, and kept
prompt      a request's text, or ids, with what the tokenizer puts around it
engine      one tokenizer with its threads
"""
