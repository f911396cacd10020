"""What watches a gateway by its metrics: alerts, a dashboard, a table in the terminal, OpenTelemetry.

``alert_rules``        ``gateway --print prometheus-rules``
``grafana_dashboard``  ``gateway --print grafana``
``metric_samples``     a scrape, parsed, and two of them as rates
``live_table``         ``lora2serve top``
``otel_metrics``       the same requests under OpenTelemetry's names for generative AI
"""
