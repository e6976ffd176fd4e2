"""`compress fit`: the best model for a size, a memory or a speed, chosen by measuring; "do not cut" is an answer.

candidates.py and prediction.py are pure: which combinations of cut, types and cache there are, and what they are
expected to give. damage.py asks the weights, measuring.py the stock runtime; run.py has the order of it all.
"""
