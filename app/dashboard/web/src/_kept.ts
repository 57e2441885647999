// What a page keeps of itself over a reload, in this tab alone.
export function keep(key: string, value: unknown): void {
  sessionStorage.setItem(key, JSON.stringify(value));
}

export function kept<T>(key: string): T | null {
  const text = sessionStorage.getItem(key);
  return text === null ? null : (JSON.parse(text) as T);
}

export function forget(key: string): void {
  sessionStorage.removeItem(key);
}
