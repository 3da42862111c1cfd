"""Reports: runs compared in tables, drawn in charts and shown on a page; exported weights.

run         one run, read from its work directory
study_file  many runs in one JSON file
study       runs compared, averaged over seeds
jobs        the runs of a recipe's sweep; sweep starts them
charts      the sections of a report, drawn by pictures
exhibits    computes what a report shows of a trained model: attacked images, curves, masks
rollout     attention rollout: where a model looks
page        the report, one HTML page
exported    weights for PyTorch, with a model_card
list_recipes, list_models    the recipes and models, with size and cost
"""
