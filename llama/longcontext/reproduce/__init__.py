"""The paper's long-context ablation in miniature: fine-tune a small model under every scheme, measure, compare.

Code Llama goes from 4,096 to 16,384 tokens by fine-tuning with theta raised from 1e4 to 1e6, and its appendix G shows
why: with theta kept, or with position interpolation, a model of the same training finds keys less far back
(arXiv 2308.12950, tables 17 and 18). Here the same is done with a model that trains in minutes, from the same start, at
equal budget, with several seeds; and what of the paper's orderings comes out again is computed, not told.

`conditions.py` has what is compared and how large it is, `statements.py` what the paper says and whether it holds,
`page.py` the tables and pictures, `cli.py` the work: it alone knows `llama.train`.
"""
