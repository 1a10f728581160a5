"""What a measurement is handed on as: tables, results JSON, a self-contained HTML page, a model card."""
