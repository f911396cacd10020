"""Rows of every form, in one way for training, parity and calibration.

rows.py          what a row is
row_forms.py     the forms that rows come in, and why a value is none
message_forms.py conversations in their variants
readers.py       files and data sets of the Hub, as plain values
data_sets.py     checked rows with where they came from; the held-out part
rendering.py     how a row is written for the model: chat template, token ids, which of them are learned
tokenization.py  every row of a data set as the samples that are trained
prompts.py       what a comparison asks
calibration.py   the token ids that a calibrated export is measured on
"""
