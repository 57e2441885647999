"""The dashboard: pages over the same services as the API, which their scripts ask as any other client does."""
