"""The Mat-VAE report's experiments, as it describes them and with their likely faults mended.

tables       its 22 tables, as data
network      its network
protocol     its training, folds and classifier, in both variants
run          from table numbers to rows of results, kept in one file of JSON
experiments  why its VAE rows stand at chance, and its MMD rows at 2 dimensions: short trainings
plots        pictures of those, and of any bundle
page         training/RESULTS.md, from the JSON alone
commands     the command line
"""
