"""Rows of every form, in one way for training, parity and calibration.

rows.py          what a row is
row_forms.py     the forms that rows come in, and why a value is none
message_forms.py conversations in their variants
text_readers.py  JSON, CSV and plain text, as values with their lines
readers.py       files of every container and data sets of the Hub, as plain values
data_sets.py     checked rows with where they came from; the held-out part
served_template.py the chat template, as a server calls it
chat_beginnings.py all beginnings of a conversation from one rendering
chat_formats.py  well-known chat formats, for base models without a template
base_template.py the chat template of a base, as a recipe has it
chat_turns.py    the turns of a conversation that are learned: prompt as served, answer as written
template_losses.py what a chat template leaves out of a row
end_tokens.py    what ends an answer
text_encoder.py  text to token ids, once for all beginnings of a conversation
rendering.py     how a row is written for the model: the samples of a row, and which tokens are learned
preference_pairs.py two answers to a prompt in token ids
samples.py       what is trained, and how it is sent between processes
sample_rendering.py rows to samples, in this process
sample_workers.py the same in several processes
sample_cache.py  samples that took a while, kept for the next run
tokenization.py  every row of a data set as the samples that are trained
preview.py       what training would be given, for a person to look at
prompts.py       what a comparison asks
calibration.py   the token ids that a calibrated export is measured on
"""
