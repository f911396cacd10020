"""Whether requests and answers are still like those that a version was promoted on.

``text_features``  figures of a prompt and its answer, taken before the texts go
``languages``      which language a text is in
``windows``        the requests that are compared: those at the promotion, and the last ones
``drift_test``     two windows, feature by feature: permutation tests, effect sizes, PSI
``drift_report``   the result as JSON and as a page
``check_drift``    ``lora2serve.drift``
"""
