"""Evaluation on lm-eval: suites, offline data, results, comparison and a Trainer callback. Needs the extra `eval`."""
