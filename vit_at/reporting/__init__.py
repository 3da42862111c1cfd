"""Runs made visible: compared in tables, drawn in charts, shown on a page.

study       work directories read back and compared, seeds averaged
sweep       many runs of one recipe
charts      the sections of a report; pictures draws them
exhibits    what is computed of a trained model: attacked images, curves, masks
rollout     where a model looks
page        the report, one HTML page
exported    weights for PyTorch with their model_card
scaling     what a recipe costs on a TPU slice, on paper
"""
