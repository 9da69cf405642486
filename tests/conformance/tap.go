// Package tap writes the Test Anything Protocol as far as the validation programs use it: their own library for it is in no
// distribution. What they count on is that each assertion is one line, "ok" or "not ok", its number and its description.
package tap

import (
	"encoding/json"
	"fmt"
	"strings"
)

// T writes one document to standard output.
type T struct {
	count int
	todo  bool
}

// New begins a document.
func New() *T {
	return &T{}
}

// Header says the version, and how many assertions follow when that is known.
func (t *T) Header(count int) {
	fmt.Println("TAP version 13")
	if count > 0 {
		fmt.Printf("1..%d\n", count)
	}
}

// AutoPlan says how many assertions there were.
func (t *T) AutoPlan() {
	fmt.Printf("1..%d\n", t.count)
}

// Ok is one assertion.
func (t *T) Ok(holds bool, description string) {
	word := "ok"
	if !holds {
		word = "not ok"
	}
	t.count++
	remark := ""
	if t.todo {
		remark = " # TODO"
	}
	t.todo = false
	fmt.Printf("%s %d - %s%s\n", word, t.count, oneLine(description), remark)
}

// Pass is an assertion that holds.
func (t *T) Pass(description string) {
	t.Ok(true, description)
}

// Fail is an assertion that does not hold.
func (t *T) Fail(description string) {
	t.Ok(false, description)
}

// Skip is assertions that are not made.
func (t *T) Skip(count int, description string) {
	for i := 0; i < count; i++ {
		t.count++
		fmt.Printf("ok %d # SKIP %s\n", t.count, oneLine(description))
	}
}

// Todo has the next assertion be one that need not hold yet.
func (t *T) Todo() *T {
	t.todo = true
	return t
}

// Diagnostic is a remark.
func (t *T) Diagnostic(text string) {
	fmt.Println("# " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n# "))
}

// Diagnosticf is a remark.
func (t *T) Diagnosticf(format string, values ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, values...))
}

// YAML is details of the last assertion; JSON is YAML.
func (t *T) YAML(details interface{}) error {
	text, err := json.MarshalIndent(details, "  ", "  ")
	if err != nil {
		return err
	}
	fmt.Printf("  ---\n  %s\n  ...\n", text)
	return nil
}

func oneLine(text string) string {
	return strings.Join(strings.Fields(text), " ")
}
