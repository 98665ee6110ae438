"""Running generated code against its tests behind two guards."""
